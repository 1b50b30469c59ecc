"""Initialisers that read the base's weight: A and B start as a part of W itself, and that part, frozen, is subtracted.

    pissa       top r singular directions            s B A = U_r S_r V_r     arXiv 2404.02948
    pissa_fast  the same by randomised SVD (Halko et al., 4 power iterations, 8 extra directions)
    minor       the r smallest singular directions   (MiLoRA)                arXiv 2406.09044
    olora       W = Q R, B = Q[:, :r], A = R[:r]                             arXiv 2406.01775

The papers write W - s B A into the base; here the op's delta is s (B A - B0 A0), so the base keeps its bits and training is the same.
Cost: one decomposition for each matrix, pissa_fast O(r a b) instead of O(a b min(a, b)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimtune.initialise.free import initialiser

if TYPE_CHECKING:
    from slimtune.core.site import Site
    from slimtune.methods.lora import LoRAOp


def fits_rank(site: Site, spec: Any) -> list[str]:
    """Return a problem if a matrix of the site has fewer directions than the rank asks for."""
    _, m, k = site.kind.matrices(torch.empty(site.shape, device="meta"), site.module).shape
    q = site.kind.inner_rank(site.module, spec.rank(site))
    if q > min(m, k):
        return [f"init={spec.init!r} takes r directions of a weight of {m}x{k}, which has {min(m, k)}, not {q}: lower r or use rank_pattern="]
    return []


def start_matrices(
    op: LoRAOp, site: Site, W: Tensor, split: Callable[[Tensor, int], tuple[Tensor, Tensor]], *, frozen: bool
) -> None:
    """Start an op from (A [q, k], B [m, q]) that `split` makes of each matrix [m, k] of W and its rank q."""
    stack = site.kind.matrices(W if W.dtype == torch.float64 else W.float(), site.module)
    q = site.kind.inner_rank(site.module, op.r)
    pairs = [split(M, q) for M in stack]  # one at a time: a batched SVD of all experts would hold U, S, V of all of them
    A, B = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    op.start_from(*site.kind.pack(A, B, site.shape), frozen=frozen)


def balanced(U: Tensor, S: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (A, B) with scale * B A = U diag(S) V, the singular values shared evenly.

    Directions without weight keep a unit row in A: with zeros in A and B no gradient would ever reach them.
    """
    root = (S / scale).sqrt()
    return torch.where(root > 0, root, 1)[:, None] * V, U * root


@initialiser("pissa", check=fits_rank)
def pissa(op: LoRAOp, site: Site, spec: Any) -> None:
    """The r largest singular directions of W, by exact SVD."""

    def top(M: Tensor, q: int) -> tuple[Tensor, Tensor]:
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        return balanced(U[:, :q], S[:q], V[:q], op.scale)

    start_matrices(op, site, site.read(), top, frozen=True)


@initialiser("pissa_fast", check=fits_rank)
def pissa_fast(op: LoRAOp, site: Site, spec: Any) -> None:
    """The r largest singular directions of W, by randomised SVD."""

    def top(M: Tensor, q: int) -> tuple[Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(M, q=min(q + 8, *M.shape), niter=4)
        return balanced(U[:, :q], S[:q], V[:, :q].T, op.scale)

    start_matrices(op, site, site.read(), top, frozen=True)


@initialiser("minor", check=fits_rank)
def minor(op: LoRAOp, site: Site, spec: Any) -> None:
    """The r smallest singular directions of W, so that training starts where the base has least to lose."""

    def bottom(M: Tensor, q: int) -> tuple[Tensor, Tensor]:
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        return balanced(U[:, -q:], S[-q:], V[-q:], op.scale)

    start_matrices(op, site, site.read(), bottom, frozen=True)


@initialiser("olora", check=fits_rank)
def olora(op: LoRAOp, site: Site, spec: Any) -> None:
    """The first r columns of Q and rows of R of W = Q R."""

    def first(M: Tensor, q: int) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(M)
        return R[:q], Q[:, :q]

    start_matrices(op, site, site.read(), first, frozen=True)
