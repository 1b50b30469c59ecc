"""The best low-rank form of a change: truncated SVD, in factored form where the change has factors.

    B A with B [m, q], A [q, k]:   B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U S V   ->   (Q_b U) S (V Q_a^T)

Cost of the factored form: O((m + k) q^2) for each matrix instead of O(m k min(m, k)); nothing of size [m, k] is made.
The error is the relative Frobenius norm |dW - dW_r| / |dW|, known from the singular values (Eckart-Young).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.algebra.change import Change, extents
from slimtune.core.errors import SpecError

Svd = tuple[Tensor, Tensor, Tensor]  # U [g, m, q], S [g, q], V [g, q, k]


@dataclass(frozen=True)
class Short:
    """A change as factors.

    Attributes:
        A, B: [G, q, k] and [G, m, q].
        r: rank of the op: q, times the groups of a convolution.
        error: relative Frobenius error.
        norm: |dW|.
    """

    A: Tensor
    B: Tensor
    r: int
    error: float
    norm: float


def shorten(change: Change, r: int | None, energy: float | None) -> Short:
    """Return the best approximation of a change by factors.

    Args:
        change: its weight must change.
        r: largest rank; the result has less where the change has fewer directions.
        energy: instead of r: the smallest rank that keeps this share of |dW|^2.
    """
    site = change.site
    unit = rank_unit(change)
    pieces = 1 if change.pair is not None else change.count
    q: int | None = None if r is None else max(1, site.kind.inner_rank(site.module, r))
    if energy is not None and pieces > 1:  # the rank is known only when all matrices were seen: each is decomposed twice, none is kept
        q = enough(torch.cat([torch.linalg.svdvals(change.piece(i)) for i in range(pieces)]), energy)
    A, B, squares, lost = [], [], 0.0, 0.0
    for i in range(pieces):
        U, S, V = factored(*change.pair) if change.pair is not None else _svd(change.piece(i))
        take = min(q if q is not None else enough(S, energy or 1.0), S.shape[-1])
        squares += float(S.double().square().sum())
        lost += float(S[:, take:].double().square().sum())
        a, b = balanced(U[..., :take], S[:, :take], V[:, :take])
        A.append(a)
        B.append(b)
    found = torch.cat(A), torch.cat(B)
    return Short(*found, r=found[0].shape[1] * unit, error=(lost / squares) ** 0.5 if squares else 0.0, norm=squares**0.5)


def as_it_is(change: Change) -> Short:
    """Return the factors of a change that has them, unchanged; more of them than the matrices have directions are first brought down to those."""
    assert change.pair is not None
    A, B = change.pair
    unit = rank_unit(change)
    _, m, k = extents(change.site)
    if A.shape[1] > min(m, k):
        return shorten(change, min(m, k) * unit, None)
    squares = ((A @ A.mT) * (B.mT @ B)).sum()  # |B A|^2 without B A
    return Short(A, B, r=A.shape[1] * unit, error=0.0, norm=float(squares.clamp(min=0).sqrt()))


def balanced(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A, B) with B A = U diag(S) V, the singular values shared evenly.

    Directions without weight keep a unit row in A and a zero column in B: with zeros in both no gradient would ever reach them.
    """
    noise = torch.finfo(S.dtype).eps * S[..., :1]
    root = torch.where(noise < S, S, 0).sqrt()
    return torch.where(root > 0, root, 1)[..., None] * V, U * root[..., None, :]


def rank_unit(change: Change) -> int:
    """Return the smallest rank a site's op can have: the number of groups of a grouped convolution, else 1."""
    G = extents(change.site)[0]
    return G if G > 1 and change.site.kind.inner_rank(change.site.module, G) == 1 else 1


def check_rule(r: int | None, energy: float | None) -> None:
    """Raise unless at most one of r and energy is given, and is sound.

    Raises:
        SpecError: naming what is wrong.
    """
    if r is not None and energy is not None:
        raise SpecError("give either r= or energy=, not both", hint="energy= finds the rank of every module by itself")
    if r is not None and (type(r) is not int or r < 1):
        raise SpecError(f"r must be an integer of at least 1, not {r!r}", hint="r=8")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise SpecError(f"energy must be a share above 0 and at most 1, not {energy!r}", hint="energy=0.99 keeps 99 % of the squared norm")


def factored(A: Tensor, B: Tensor) -> Svd:
    """Return the SVD of B A, from stacks A [G, q, k] and B [G, m, q]."""
    Qb, Rb = torch.linalg.qr(B)  # [G, m, q'], [G, q', q]
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, V = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, V @ Qa.mT


def _svd(M: Tensor) -> Svd:
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    return U, S, V


def enough(S: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps a share of the energy of all matrices [G, n] together."""
    by_rank = S.double().square().sum(0)
    lost = by_rank.flip(0).cumsum(0).flip(0)  # what a rank of 0, 1, ... loses, summed from the small end
    return max(1, int((lost > (1 - energy) * lost[0]).sum())) if float(lost[0]) else 1
