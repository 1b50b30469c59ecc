"""EVA: A starts as the r directions in which a layer's inputs vary most, B as zero; ranks go where they explain most.

Paper: arXiv 2410.07170, algorithm 1. The inputs' principal directions by incremental SVD (with the running mean, as in Ross et al. 2008):
    [S V; X - mean(X); sqrt(n m / (n + m)) (mean_n - mean(X))] = U' S' V'        after n rows, with m new ones
Then, of all modules' first rho r directions, those with the highest share of their layer's variance get the sum of all ranks;
s stays what it was, and a module that gets none is left out.
Cost: one thin SVD per different input and batch, (k + m) a k FLOPs; memory k a floats for it, k = 2 rho r + 8. Tokens without a label do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import DataError
from slimtune.core.site import Site
from slimtune.initialise.study import Found, look, study


@dataclass(frozen=True)
class Directions:
    """What is known of one stream of inputs.

    Attributes:
        n: rows seen.
        mean: [a].
        variance: sum of squares about the mean, of all entries.
        SV: [k, a], singular values times right singular vectors.
    """

    n: int
    mean: Tensor
    variance: float
    SV: Tensor

    def components(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the first k directions [k, a] and the share of the variance that each explains [k]."""
        S = self.SV.norm(dim=1)[:k]
        return self.SV[:k] / S.clamp(min=1e-30)[:, None], S.square() / max(self.variance, 1e-30)


def absorb(old: Directions | None, X: Tensor, k: int) -> Directions:
    """Return what is known after the rows X [m, a] too, of up to k directions."""
    m = X.shape[0]
    mean = X.mean(0)
    rows = X - mean
    variance = float(rows.square().sum())
    n = 0
    if old is not None:
        n, gap = old.n, old.mean - mean
        rows = torch.cat([old.SV, rows, (n * m / (n + m)) ** 0.5 * gap[None]])
        variance += old.variance + n * m / (n + m) * float(gap.square().sum())
        mean = mean + n / (n + m) * gap
    return Directions(n + m, mean, variance, _top(rows, k))


def _top(rows: Tensor, k: int) -> Tensor:
    """Return S V [<= k, a] of the rows, exactly where that is cheap, else by randomised SVD."""
    if min(rows.shape) <= 4 * k:
        _, S, V = torch.linalg.svd(rows, full_matrices=False)
    else:
        torch.manual_seed(0)  # the caller's random state is put back by `look`
        _, S, V = torch.svd_lowrank(rows, q=2 * k, niter=2)
        V = V.T
    return S[:k, None] * V[:k]


@study("eva")
def eva(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any) -> Found:
    """Return A of every site that gets a rank."""
    most = [min(round(spec.rho * spec.rank(site)), site.a) for site in sites]
    keep = [2 * m + 8 for m in most]
    known: list[Directions | None] = [None for _ in sites]
    last: tuple[Any, Any, int, Directions] | None = None  # (input, what was known before, k, what is known now) of the site that ran last

    def see(i: int, x: Tensor, _: Tensor | None) -> None:
        nonlocal last
        if last is None or last[0]() is not x or last[1] is not known[i] or last[2] != keep[i]:
            last = (weakref.ref(x), known[i], keep[i], absorb(known[i], x, keep[i])) if x.shape[0] else last
        if x.shape[0]:
            assert last is not None
            known[i] = last[3]

    look(model, sites, data, spec, see, labels=True)
    found = [k.components(m) if k is not None else None for k, m in zip(known, most, strict=True)]
    for site, f, m in zip(sites, found, most, strict=True):
        have = 0 if f is None else int((f[1] > 1e-12).sum())
        if have < m:
            raise DataError(
                f"EVA needs {m} directions here (rho r), and the inputs in these batches have {have}",
                where=str(site),
                hint="give more or longer batches (labels of -100 do not count), or lower r or rho",
            )
    ranks = shares([f[1] for f in found if f is not None], sum(spec.rank(site) for site in sites))
    return {(s.path, s.param): (f[0][:r], None) for s, f, r in zip(sites, found, ranks, strict=True) if f is not None and r}


def shares(explained: list[Tensor], budget: int) -> list[int]:
    """Return each site's rank: the `budget` directions that explain most of their own layer's variance."""
    site = torch.cat([torch.full((len(e),), i) for i, e in enumerate(explained)])
    best = torch.cat([e.cpu() for e in explained]).argsort(descending=True, stable=True)[:budget]
    return torch.bincount(site[best], minlength=len(explained)).tolist()  # type: ignore[no-any-return]
