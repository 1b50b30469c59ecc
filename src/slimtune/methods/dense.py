"""Fully trained modules: W' = W + D and b' = b + d, both deltas dense and zero at the start.

Cost: as many parameters as the module has; the delta form lets it merge, subtract, sum and differ by row like any other op.
In files the full weight stands (the reference library's `modules_to_save`), so that it fits a head that starts at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec


class DenseOp(Additive):
    """D in the weight's canonical shape, d [b] where the module has a bias."""

    roles = {"D": "dense", "d": "bias"}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.D = nn.Parameter(torch.zeros(site.shape, device=site.device, dtype=site.dtype))
        b = site.kind.bias(site.module, site.param)
        self.d = None if b is None else nn.Parameter(torch.zeros(b.shape, device=site.device, dtype=site.dtype))

    def delta(self) -> Tensor:
        return self.D

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        out = self.kind.apply(x, cast(self.D, y), host)
        return out if self.d is None else out + self.kind.along_output(cast(self.d, y), out)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if self.d is None or b is None else b + self.d.to(device=b.device, dtype=b.dtype)


@register("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Spec):
    """Train whole modules, as a delta to the base.

    Args:
        targets: default: the output head(s) of the model.

    Example:
        >>> import slimtune as st
        >>> st.Dense(targets=("score",)).method
        'dense'
    """

    targets: str | tuple[str, ...] = "head"

    def build(self, site: Site) -> DenseOp:
        return DenseOp(site)
