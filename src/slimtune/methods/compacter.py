"""Compacter: bottleneck adapters whose projections are sums of Kronecker products, W = sum_i A_i (x) (S_i T_i), i = 1 ... n.

Paper: arXiv 2106.04647 (eq. 4 to 6): the small A_i [n, n] are shared by both projections and all sites of an adapter, B_i = S_i T_i has rank r
(1 in the paper). Houlsby's places by default; after feed-forwards only (targets="down") it is Compacter++.
Cost per site of width b and bottleneck m: 2 r (b + m) + b + m parameters, and n^3 for all sites together; 2 n_tokens r (b + m) (1 + n / m)
FLOPs or so, as no W is formed; kept for backward as by `Bottleneck`, and r n numbers for each token and projection.
Cannot: merge (it is not affine), convert to a LoRA, sit where n does not divide the width.
Choose it when bottleneck adapters do the job but their files must be several times smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.op import cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.methods.bottleneck import Bottleneck, BottleneckOp


class CompacterOp(BottleneckOp):
    """rule [n, n, n] (shared: the A_i), down_s [n, b / n, r], down_t [n, r, m / n], down_b [m], up_s [n, m / n, r], up_t [n, r, b / n], up_b [b]."""

    roles = {
        "rule": "core", "down_s": "down", "down_t": "down", "down_b": "bias", "up_s": "up", "up_t": "up", "up_b": "bias", "s": "gain",
        "norm_in_w": "gain", "norm_in_b": "bias", "norm_out_w": "gain", "norm_out_b": "bias",
    }  # fmt: skip
    down_s: nn.Parameter
    down_t: nn.Parameter
    up_s: nn.Parameter
    up_t: nn.Parameter

    def make_maps(self, site: Site, spec: Any, new: Any) -> None:
        self.n, self.rank = n, r = spec.n, spec.rank
        key = f"compacter {n}"
        if key not in site.shared:
            site.shared[key] = nn.Parameter(torch.empty(n, n, n, **new))
            if not site.blank:
                nn.init.normal_(site.shared[key], std=n**-0.5)
        self.rule: nn.Parameter = site.shared[key]
        for name, wide, narrow in (("down", self.c, self.m), ("up", self.m, self.b)):
            s, t = torch.zeros(n, wide // n, r, **new), torch.zeros(n, r, narrow // n, **new)
            if not site.blank:
                std = (3.0 * wide * r) ** -0.25  # W's entries get the variance 1 / (3 wide) of a linear layer's
                nn.init.normal_(s, std=std)
                if name == "down" or self.norm_out_w is not None:
                    nn.init.normal_(t, std=std)
            self.register_parameter(f"{name}_s", nn.Parameter(s))
            self.register_parameter(f"{name}_t", nn.Parameter(t))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(narrow, **new)))

    def down(self, x: Tensor) -> Tensor:
        return self._product(x, self.down_s, self.down_t) + cast(self.down_b, x)

    def up(self, h: Tensor) -> Tensor:
        return self._product(h, self.up_s, self.up_t) + cast(self.up_b, h)

    def _product(self, x: Tensor, S: Tensor, T: Tensor) -> Tensor:
        """Return x W for W = sum_i A_i (x) (S_i T_i), factor by factor."""
        parts = x.unflatten(-1, (self.n, -1))  # [.., n, k / n]
        h = torch.einsum("...pk,ikr->...ipr", parts, cast(S, x))  # [.., n, n, r]
        h = torch.einsum("...ipr,ipq->...iqr", h, cast(self.rule, x).to(x.device))
        return torch.einsum("...iqr,irl->...ql", h, cast(T, x)).flatten(-2)  # [.., n, l / n] -> [.., l]

    def settings(self) -> dict[str, Any]:
        return {"m": self.m, "n": self.n, "rank": self.rank}


@register("compacter")
@dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """Low-rank hypercomplex adapters (arXiv 2106.04647).

    Args:
        n: terms of the sums, and the size of the shared matrices; must divide the widths.
        rank: of each B_i.
        targets: default: "o" and "down", after attentions and feed-forwards; "down" alone is Compacter++.
        reduction: the bottleneck is the site's width / reduction, rounded down to a multiple of n, at least n.
        nonlinearity, norm, scale, train_scale, dropout: see `Bottleneck`.

    Example:
        >>> import slimtune as st
        >>> st.Compacter(targets="down").n
        4
    """

    op: ClassVar[type[BottleneckOp]] = CompacterOp

    targets: str | tuple[str, ...] = ("maybe:o", "maybe:down")
    nonlinearity: str = "gelu_tanh"
    n: int = 4
    rank: int = 1

    def problems(self) -> list[str]:
        wrong = [f"{name} must be at least 1, not {value}" for name, value in (("n", self.n), ("rank", self.rank)) if value < 1]
        return wrong + super().problems()

    def check(self, site: Site) -> list[str]:
        wrong = super().check(site)
        if not wrong and site.b % self.n:
            wrong.append(f"n={self.n} does not divide the width {site.b}")
        return wrong

    def width(self, site: Site) -> int:
        return max(self.n, int(site.b // self.reduction) // self.n * self.n)
