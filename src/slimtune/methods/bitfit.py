"""BitFit: only biases train, b' = b + d with d zero at the start.

Paper: arXiv 2106.10199. Cost: b parameters per module, one addition; nothing is kept for backward.
Cannot: change a weight (converting it to a LoRA is not defined).
Choose it when the model has biases and a file must be tiny; a good first baseline for encoders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.core.op import Op, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec


class BitFitOp(Op):
    """d [b]."""

    roles = {"d": "bias"}
    linear_in = {"d": 0.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.d = nn.Parameter(torch.zeros(site.b, device=site.device, dtype=site.dtype))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return self.kind.along_output(cast(self.d, y), y).expand_as(y)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.d if b is None else b + self.d.to(device=b.device, dtype=b.dtype)


@register("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(Spec):
    """Train biases only (arXiv 2106.10199).

    Args:
        missing: "skip": only modules that have a bias; "add": every target gets one; "auto": "skip", unless no target has one (as
            in Llama), then "add".
        targets: default: the linear layers and the norms, whichever of them the model has.

    Example:
        >>> import slimtune as st
        >>> st.BitFit(missing="add").missing
        'add'
    """

    targets: str | tuple[str, ...] = ("maybe:all-linear", "maybe:norm")
    missing: str = "auto"

    def problems(self) -> list[str]:
        return [] if self.missing in {"auto", "skip", "add"} else [f'missing must be "auto", "skip" or "add", not {self.missing!r}']

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        have = [s for s in sites if s.kind.bias(s.module, s.param) is not None]
        if self.missing == "add" or (self.missing == "auto" and not have):
            return [s for s in sites if s.kind.takes_bias]
        return have

    def check(self, site: Site) -> list[str]:
        return [] if site.kind.takes_bias else [f"{site.kind.noun} takes no bias"]

    def build(self, site: Site) -> BitFitOp:
        return BitFitOp(site)
