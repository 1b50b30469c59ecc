"""CorDA: B A starts as a part of W that its inputs' covariance C picks: W C = U S V^T, s B A = U_q S_q V_q^T C^-1.

Paper: arXiv 2406.05223. `corda` (the paper's instruction-previewed mode) takes the first r directions, where this data uses W most;
`corda_kpm` (knowledge-preserved) the last r, where it uses it least. C = X^T X / n over the tokens seen, 1 % of its mean diagonal added
to its diagonal (doubled until C C^-1 = I to 0.05). That part, frozen, is subtracted, so the base keeps its bits.
Cost: a^2 floats for every different input, while looking; one SVD of a [b, a] matrix per site.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import DataError
from slimtune.core.site import Site
from slimtune.initialise.spectral import balanced
from slimtune.initialise.study import Found, bar, directions, look, study


def covariances(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any) -> list[tuple[Tensor, int]]:
    """Return (X^T X [a, a], n) of every site; sites that read the same tensors share one tensor."""
    sums: list[Tensor | None] = [None for _ in sites]
    counts = [0 for _ in sites]
    last: tuple[Any, Any, Tensor] | None = None  # (input, the sum before, the sum now) of the site that ran last

    def see(i: int, x: Tensor, _: Tensor | None) -> None:
        nonlocal last
        if last is None or last[0]() is not x or last[1] is not sums[i]:
            before = sums[i]
            last = (weakref.ref(x), before, x.T @ x if before is None else torch.addmm(before, x.T, x))
        sums[i] = last[2]
        counts[i] += x.shape[0]

    look(model, sites, data, spec, see)
    return [(s, n) for s, n in zip(sums, counts, strict=True) if s is not None]


def damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C with its diagonal raised, the inverse of that) in float64."""
    C = C.double()
    eye = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    damp = 0.01
    while True:
        raised = C + damp * C.diagonal().mean() * eye
        inverse = torch.linalg.inv(raised)
        if float((raised @ inverse - eye).norm()) < 0.05 or damp > 1e6:
            return raised, inverse
        damp *= 2


def _corda(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any) -> Found:
    found: Found = {}
    same: tuple[Tensor, Tensor, Tensor] | None = None  # of the site before: q, k and v have one covariance
    pairs = list(zip(sites, covariances(model, sites, data, spec), strict=True))
    with torch.no_grad():
        for site, (total, n) in bar(pairs, f"init {spec.init}", "module"):
            if not total.diagonal().any() or not total.isfinite().all():
                raise DataError("what these batches bring here is zero or not finite", where=str(site), hint="give other batches, or exclude= it")
            if same is None or same[0] is not total:
                same = (total, *damped(total / n))
            U, S, V = torch.linalg.svd(site.read().double() @ same[1], full_matrices=False)
            r = spec.rank(site)
            pick = slice(None, r) if spec.init == "corda" else slice(len(S) - r, None)
            found[site.path, site.param] = balanced(U[:, pick], S[pick], V[pick] @ same[2], spec.scale(site))
    return found


study("corda", check=directions)(_corda)
study("corda_kpm", check=directions)(_corda)
