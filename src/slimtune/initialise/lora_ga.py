"""LoRA-GA: A and B start in the directions of the first full gradient G = U S V^T of W, so that LoRA's first step is like full training's.

Paper: arXiv 2407.05000, algorithm 1: A = b^(1/4) / sqrt(gamma) V[:r], B = b^(1/4) / sqrt(gamma) U[:, r:2r] for an output width of b, gamma = 16.
s B A, frozen, is subtracted, so that the start is the base and the base keeps its bits. (The reference library scales B by the singular
values as well and leaves A alone; the directions are the same.)
Cost: forward and backward of the batches; while looking, G [b, a] in float32 for every site. Only inputs and the outputs' gradients
are needed, so it works on quantised bases too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import DataError
from slimtune.core.site import Site
from slimtune.initialise.study import Found, bar, directions, look, study

GAMMA = 16.0


def gradients(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any) -> list[Tensor]:
    """Return the gradient [b, a] of every site's weight, summed over the batches."""
    found = [torch.zeros(site.b, site.a, device=site.device) for site in sites]

    def see(i: int, x: Tensor, g: Tensor | None) -> None:
        assert g is not None
        found[i].addmm_(g.T, x)  # [b, n] @ [n, a]

    look(model, sites, data, spec, see, backward=True)
    return found


def _check(site: Site, spec: Any) -> list[str]:
    return directions(site, spec, 2)


@study("lora_ga", check=_check)
def lora_ga(model: nn.Module, sites: list[Site], data: Iterable[Any], spec: Any) -> Found:
    """Return A and B of every site."""
    out: Found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for site, G in bar(list(zip(sites, gradients(model, sites, data, spec), strict=True)), "init lora_ga", "module"):
            if not G.isfinite().all() or not G.any():
                raise DataError("the gradient of these batches is zero or not finite here", where=str(site), hint="give other batches")
            r = spec.rank(site)
            if min(G.shape) <= 8 * r:
                U, _, V = torch.linalg.svd(G, full_matrices=False)
            else:
                U, _, V = torch.svd_lowrank(G, q=4 * r, niter=4)
                V = V.T
            root = site.b**0.25 / GAMMA**0.5
            out[site.path, site.param] = (root * V[:r], root * U[:, r : 2 * r])
    return out
