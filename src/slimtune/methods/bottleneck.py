"""Bottleneck adapter: y' = y + s up(f(down(y))) after a sub-block, before its residual is added.

Papers: Pfeiffer placement (after the feed-forward) arXiv 2005.00247; the block itself: arXiv 1902.00751.
Cost per site of width b and bottleneck m: 2 b m + b + m parameters, 4 n b m FLOPs; kept for backward: y, the bottleneck [n, m].
Cannot: merge (it is not affine), convert to a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.op import Op, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda t: t,
}


class BottleneckOp(Op):
    """down_w [m, b], down_b [m], up_w [b, m], up_b [b]."""

    roles = {"down_w": "down", "down_b": "bias", "up_w": "up", "up_b": "bias"}

    def __init__(self, site: Site, m: int, nonlinearity: str, scale: float) -> None:
        super().__init__(site)
        self.nonlinearity, self.scale, self.m = nonlinearity, scale, m
        new: Any = {"device": site.device, "dtype": site.dtype}
        self.down_w = nn.Parameter(torch.empty(m, site.b, **new))
        self.down_b = nn.Parameter(torch.zeros(m, **new))
        self.up_w = nn.Parameter(torch.zeros(site.b, m, **new))
        self.up_b = nn.Parameter(torch.zeros(site.b, **new))
        if not site.blank:
            nn.init.kaiming_uniform_(self.down_w, a=math.sqrt(5))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        h = F.linear(y, cast(self.down_w, y), cast(self.down_b, y))  # [n, b] -> [n, m]
        h = NONLINEARITIES[self.nonlinearity](h)
        return self.scale * F.linear(h, cast(self.up_w, y), cast(self.up_b, y))  # [n, m] -> [n, b]

    def settings(self) -> dict[str, object]:
        return {"m": self.m}


@register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Spec):
    """Bottleneck adapters after each feed-forward (Pfeiffer, arXiv 2005.00247).

    Args:
        reduction: the bottleneck is the site's width / reduction, at least 1.
        nonlinearity: relu | gelu | silu | tanh | identity.
        scale: s, a constant factor on the adapter's output.
        targets: modules whose output is adapted; default: the last linear layer of each feed-forward.

    Example:
        >>> import slimtune as st
        >>> st.Bottleneck(reduction=16).reduction
        16
    """

    port = "output"

    targets: str | tuple[str, ...] = "down"
    reduction: float = 16
    nonlinearity: str = "relu"
    scale: float = 1.0

    def problems(self) -> list[str]:
        wrong = [] if self.reduction > 0 else [f"reduction must be positive, not {self.reduction}"]
        if self.nonlinearity not in NONLINEARITIES:
            wrong.append(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, not {self.nonlinearity!r}")
        return wrong

    def check(self, site: Site) -> list[str]:
        return [] if site.b > 0 and site.kind.channels_last else [f"the width of the output of a {site.kind.name} is not its last dimension"]

    def build(self, site: Site) -> BottleneckOp:
        return BottleneckOp(site, max(1, int(site.b // self.reduction)), self.nonlinearity, self.scale)
