"""EVA: A starts as the r directions in which a layer's inputs vary most, B as zero; ranks go where they explain most.

Paper: arXiv 2410.07170, algorithm 1. The inputs' principal directions by incremental SVD (with the running mean, as in Ross et al. 2008):
    [S V; X - mean(X); sqrt(n m / (n + m)) (mean_n - mean(X))] = U' S' V'        after n rows, with m new ones
Then, of all modules' first rho r directions, those with the highest share of their layer's variance get the sum of all ranks;
s stays what it was, and a module that gets none is left out.
Tokens without a label do not count, as in the reference library, unless those with one have too few directions (short answers).
Cost: one thin SVD per different input and batch, (k + m) a k FLOPs; memory k a floats for it, k = 2 rho r + 8.
"""

from __future__ import annotations

import itertools
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
    batches = list(itertools.islice(iter(data), spec.init_batches))
    most = [min(round(spec.rho * spec.rank(site)), site.a) for site in sites]
    for labels in (True, False):
        found = principal(model, sites, batches, spec, most, labels)
        short = [i for i, (_, share) in enumerate(found) if int((share > 1e-12).sum()) < most[i]]
        if not short:
            break
    else:
        i = short[0]
        raise DataError(
            f"EVA needs {most[i]} directions here (rho r), and the inputs in these batches have {int((found[i][1] > 1e-12).sum())}",
            where=str(sites[i]),
            hint="give more or longer batches, or lower r or rho",
        )
    ranks = shares([share for _, share in found], sum(spec.rank(site) for site in sites))
    return {(s.path, s.param): (V[:r], None) for s, (V, _), r in zip(sites, found, ranks, strict=True) if r}


def principal(
    model: nn.Module, sites: list[Site], batches: list[Any], spec: Any, most: list[int], labels: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return up to most[i] directions of the inputs of each site i, and the share of the variance that each explains."""
    keep = [2 * m + 8 for m in most]
    known: list[Directions | None] = [None for _ in sites]
    last: tuple[Any, Any, int, Directions] | None = None  # (input, what was known before, k, what is known now) of the site that ran last

    def see(i: int, x: Tensor, _: Tensor | None) -> None:
        nonlocal last
        if not x.shape[0]:
            return
        if last is None or last[0]() is not x or last[1] is not known[i] or last[2] != keep[i]:
            last = (weakref.ref(x), known[i], keep[i], absorb(known[i], x, keep[i]))
        known[i] = last[3]

    look(model, sites, batches, spec, see, labels=labels)
    return [k.components(m) if k is not None else (torch.zeros(0, 0), torch.zeros(0)) for k, m in zip(known, most, strict=True)]


def shares(explained: list[Tensor], budget: int) -> list[int]:
    """Return each site's rank: the `budget` directions that explain most of their own layer's variance."""
    site = torch.cat([torch.full((len(e),), i) for i, e in enumerate(explained)])
    best = torch.cat([e.cpu() for e in explained]).argsort(descending=True, stable=True)[:budget]
    return torch.bincount(site[best], minlength=len(explained)).tolist()  # type: ignore[no-any-return]
