"""Bottleneck adapter: y' = y + s up(f(down(y))) on the output y of a sub-block, before its residual is added.

Papers: after each feed-forward (Pfeiffer) arXiv 2005.00247; the block itself, and after each attention too (`Houlsby`) arXiv 1902.00751;
beside a sub-block, from its input (`Parallel`) arXiv 2110.04366. up starts at zero.
Cost per site of width b and bottleneck m: 2 b m + b + m parameters (with a norm before or after, 2 b more each), 4 n b m FLOPs; kept for
backward: y, the bottleneck [n, m]. Cannot: merge (it is not affine), convert to a LoRA.
Choose it when many tasks share one base that is served unmerged, and a nonlinear adapter is worth its extra step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.blocks import resolve
from slimtune.core.errors import SiteError
from slimtune.core.op import Op, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.targets import find_sites
from slimtune.kernels.dropout import dropout

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda t: t,
}
NORMS = ("none", "before", "after", "both")


class BottleneckOp(Op):
    """down_w [m, c], down_b [m], up_w [b, m], up_b [b], with c the width it reads: b (the output) or a (the sub-block's input).

    Where asked for: s [1]; norm_in_w, norm_in_b [c] of a layer norm before down; norm_out_w, norm_out_b [b] of one after up, whose gain
    starts at zero in place of up's.
    """

    roles = {
        "down_w": "down", "down_b": "bias", "up_w": "up", "up_b": "bias", "s": "gain",
        "norm_in_w": "gain", "norm_in_b": "bias", "norm_out_w": "gain", "norm_out_b": "bias",
    }  # fmt: skip
    reads_input: ClassVar[bool] = False

    def __init__(self, site: Site, m: int, spec: Bottleneck) -> None:
        super().__init__(site)
        self.m, self.nonlinearity, self.scale, self.dropout = m, spec.nonlinearity, spec.scale, spec.dropout
        self.c, self.b = site.a if self.reads_input else site.b, site.b
        new: Any = {"device": site.device, "dtype": site.dtype}
        before, after = spec.norm in {"before", "both"}, spec.norm in {"after", "both"}
        self.s = nn.Parameter(torch.full((1,), float(spec.scale), **new)) if spec.train_scale else None
        self.norm_in_w = nn.Parameter(torch.ones(self.c, **new)) if before else None
        self.norm_in_b = nn.Parameter(torch.zeros(self.c, **new)) if before else None
        self.norm_out_w = nn.Parameter(torch.zeros(self.b, **new)) if after else None
        self.norm_out_b = nn.Parameter(torch.zeros(self.b, **new)) if after else None
        self.make_maps(site, spec, new)

    def make_maps(self, site: Site, spec: Any, new: Any) -> None:
        """Make the down and up projections, so that the whole is zero at the start."""
        self.down_w = nn.Parameter(torch.empty(self.m, self.c, **new))
        self.down_b = nn.Parameter(torch.zeros(self.m, **new))
        self.up_w = nn.Parameter(torch.zeros(self.b, self.m, **new))
        self.up_b = nn.Parameter(torch.zeros(self.b, **new))
        if not site.blank:
            nn.init.kaiming_uniform_(self.down_w, a=math.sqrt(5))
            if self.norm_out_w is not None:
                nn.init.kaiming_uniform_(self.up_w, a=math.sqrt(5))

    def down(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self.down_w, x), cast(self.down_b, x))  # [n, c] -> [n, m]

    def up(self, h: Tensor) -> Tensor:
        return F.linear(h, cast(self.up_w, h), cast(self.up_b, h))  # [n, m] -> [n, b]

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        v = x if self.reads_input else y
        if v.shape[-1] != self.c:
            raise SiteError(
                f"an adapter of width {self.c} got vectors of width {v.shape[-1]}",
                where=f"{host.slim.path} ({type(host).__name__})",  # type: ignore[union-attr]
                hint="name the linear layers inside this module with targets=",
            )
        if self.norm_in_w is not None:
            assert self.norm_in_b is not None
            v = F.layer_norm(v, (self.c,), cast(self.norm_in_w, v), cast(self.norm_in_b, v))
        h = NONLINEARITIES[self.nonlinearity](self.down(v.to(y.dtype)))
        h = dropout(h, self.dropout) if self.training and self.dropout else h
        d = self.up(h)
        if self.norm_out_w is not None:
            assert self.norm_out_b is not None
            d = F.layer_norm(d, (self.b,), cast(self.norm_out_w, d), cast(self.norm_out_b, d))
        return (self.scale if self.s is None else cast(self.s, d)) * d

    def settings(self) -> dict[str, Any]:
        return {"m": self.m}


@register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Spec):
    """Bottleneck adapters after each feed-forward (Pfeiffer, arXiv 2005.00247).

    Args:
        reduction: the bottleneck is the site's width / reduction, at least 1.
        nonlinearity: relu | gelu | gelu_tanh | silu | tanh | identity.
        norm: a trained layer norm inside the adapter: none | before (down) | after (up) | both.
        scale: s, a factor on the adapter's output.
        train_scale: train s, from `scale` on, one for each site.
        dropout: probability of dropping a unit of the bottleneck while training.
        targets: modules whose output is adapted. "o" stands for the end of each attention (of cross-attentions too), "down" for the end of each
            feed-forward (a mixture of experts counts as one), "whole-layer" for the residual stream after each layer. Default: "down".

    Example:
        >>> import slimtune as st
        >>> st.Bottleneck(reduction=16).reduction
        16
    """

    port = "output"
    op: ClassVar[type[BottleneckOp]] = BottleneckOp

    targets: str | tuple[str, ...] = "down"
    reduction: float = 16
    nonlinearity: str = "relu"
    norm: str = "none"
    scale: float = 1.0
    train_scale: bool = False
    dropout: float = 0.0

    def problems(self) -> list[str]:
        wrong = [] if self.reduction > 0 else [f"reduction must be positive, not {self.reduction}"]
        if self.nonlinearity not in NONLINEARITIES:
            wrong.append(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, not {self.nonlinearity!r}")
        if self.norm not in NORMS:
            wrong.append(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), not {self.dropout}")
        return wrong

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(model, replace(self, targets=resolve(model, self.targets)), self.port)

    def check(self, site: Site) -> list[str]:
        if site.kind.channels_last and site.b > 0:
            return []
        if site.b <= 0:
            return [f"the width of the output of a {type(site.module).__name__} is not known"]
        return [f"the width of the output of {site.kind.noun} is not its last dimension"]

    def width(self, site: Site) -> int:
        """Return m at one site."""
        return max(1, int(site.b // self.reduction))

    def build(self, site: Site) -> BottleneckOp:
        return self.op(site, self.width(site), self)


__all__ = ["NONLINEARITIES", "Bottleneck", "BottleneckOp"]
