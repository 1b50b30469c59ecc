"""LoRA: y += s (x A^T) B^T, the weight delta s B A of rank r.

Paper: arXiv 2106.09685; rank-stabilised scale alpha / sqrt(r): arXiv 2312.03732.
Cost per linear map [b, a]: r (a + b) parameters, 2 n r (a + b) FLOPs forward; activations kept: x (shared) and h [n, r].
Works on linear maps, convolutions, embeddings, attention projections and 3-D expert weights. Cannot: nothing known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError, closest
from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.targets import matches
from slimtune.initialise import INITS, init_problems, initialise
from slimtune.kernels.lowrank import add_low_rank, fusing


class LoRAOp(Additive):
    """A [r, a] and B [b, r]; with `A0`, `B0` the delta is s (B A - B0 A0): zero at the start, whatever A and B began as."""

    roles = {"A": "down", "B": "up", "up_bias": "bias"}
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, site: Site, r: int, scale: float, dropout: float = 0.0, up_bias: bool = False) -> None:
        super().__init__(site)
        self.r, self.scale, self.dropout = r, scale, dropout
        shape_a, shape_b = site.kind.factor_shapes(site.module, site.param, r)
        self.A = nn.Parameter(torch.empty(shape_a, device=site.device, dtype=site.dtype))
        self.B = nn.Parameter(torch.empty(shape_b, device=site.device, dtype=site.dtype))
        self.up_bias = nn.Parameter(torch.zeros(site.b, device=site.device, dtype=site.dtype)) if up_bias else None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    def start_from(self, A: Tensor, B: Tensor, *, frozen: bool) -> None:
        """Set A and B; `frozen` keeps copies of them whose product is subtracted, so that the base need not change."""
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)
        if frozen:
            self.freeze_start()

    def freeze_start(self) -> None:
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the (A, B) of the whole delta / s, frozen part included: rank r or 2 r."""
        if self.A0 is None:
            return self.A, self.B
        return self.kind.beside(self.A, self.B, self.A0, -self.B0)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scale * self.kind.compose(A, B, self.shape)

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        A, B = self.factors()
        x = x if self.dropout == 0 or not self.training else torch.dropout(x, self.dropout, True)
        h = self.kind.down(x, cast(A, y), host)
        d = self.scale * self.kind.up(h, cast(B, y), host)
        return d if self.up_bias is None else d + self.kind.along_output(self.scale * cast(self.up_bias, y), d)

    def low_rank(self) -> tuple[Tensor, Tensor, float, float] | None:
        """Return (A, B, s, dropout probability now) for fused kernels, or None when the op is more than that."""
        if self.up_bias is not None:
            return None
        return *self.factors(), self.scale, self.dropout if self.training else 0.0

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        """Accumulate into y with one autograd function, where the map is linear and nothing else is asked for."""
        fused = self.low_rank() if self.kind.name == "linear" and y.dtype == x.dtype and fusing(y) else None
        if fused is None:
            return super().add(x, y, host, w)
        A, B, scale, p = fused
        return add_low_rank(y, x, A, B, scale if w is None else scale * float(w), p)

    def bias(self, b: Tensor | None) -> Tensor | None:
        if self.up_bias is None:
            return b
        extra = self.scale * self.up_bias
        return extra if b is None else b + extra.to(device=b.device, dtype=b.dtype)

    # ---- files --------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        wide = self.kind.name == "conv" and self.A.shape[1] != self.shape[1]  # the reference's layout of a grouped convolution
        return {"r": self.r, "scale": self.scale, "frozen_start": self.A0 is not None, "up_bias": self.up_bias is not None, "wide": wide}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        r, scale, frozen, up_bias, wide = (settings.get(k) for k in ("r", "scale", "frozen_start", "up_bias", "wide"))
        flags = {type(v) for v in (frozen, up_bias, wide)}
        if type(r) is not int or not 0 < r < 2**24 or not isinstance(scale, (int, float)) or flags != {bool} or len(settings) != 5:
            raise SpecError(f"these are no settings of a LoRA: {str(settings)[:200]}", where=str(site))
        self.r, self.scale = r, float(scale)
        new: dict[str, Any] = {"device": self.A.device, "dtype": self.A.dtype}
        shape_a, shape_b = site.kind.factor_shapes(site.module, site.param, r)
        shape_a = site.kind.layouts(site.module, site.param, r)[-1] if wide else shape_a
        for name, shape in (("A", shape_a), ("B", shape_b)):
            if getattr(self, name).shape != shape:
                setattr(self, name, nn.Parameter(torch.empty(shape, **new)))
            setattr(self, f"{name}0", torch.empty(shape, **new) if frozen else None)
        if up_bias != (self.up_bias is not None):
            self.up_bias = nn.Parameter(torch.empty(site.b, **new)) if up_bias else None


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Spec):
    """Low-rank adaptation (arXiv 2106.09685).

    Args:
        r: rank.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with `rank_stabilised`; default: 2 r.
        rank_stabilised: arXiv 2312.03732.
        dropout: probability of dropping an input of the down projection while training.
        init: how A and B start; see `slimtune.initialise`. None of them changes the base.
        up_bias: train a bias [b] on the up projection.
        rank_pattern, alpha_pattern: target pattern -> rank / alpha, for modules that differ; the first match counts.
        loftq_source: folder with the original, unquantised safetensors (init="loftq").
        targets, layers, exclude, train_modules: see `Spec`.

    Example:
        >>> import slimtune as st
        >>> st.LoRA(r=16, targets=("q_proj", "v_proj"), rank_pattern={"layers.0.*": 4}).r
        16
    """

    r: int = 8
    alpha: float | None = None
    rank_stabilised: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    up_bias: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    loftq_source: str | None = None

    def problems(self) -> list[str]:
        wrong = []
        if self.r < 1:
            wrong.append(f"r must be at least 1, not {self.r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), not {self.dropout}")
        if self.init not in INITS:
            wrong.append(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        if self.init == "loftq" and not self.loftq_source:
            wrong.append('init="loftq" needs loftq_source=, the folder of the unquantised model')
        for key, value in (self.rank_pattern or {}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                wrong.append(f"rank_pattern[{key!r}] must be an integer of at least 1, not {value!r}")
        for key, alpha in (self.alpha_pattern or {}).items():
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
                wrong.append(f"alpha_pattern[{key!r}] must be a number, not {alpha!r}")
        return wrong

    def rank(self, site: Site) -> int:
        """Return the rank at one site."""
        return int(_by_pattern(self.rank_pattern, site, self.r))

    def scale(self, site: Site) -> float:
        """Return s at one site."""
        r = self.rank(site)
        default = self.alpha if self.alpha is not None else 2.0 * self.r
        alpha = _by_pattern(self.alpha_pattern, site, default)
        return float(alpha) / (math.sqrt(r) if self.rank_stabilised else r)

    def check(self, site: Site) -> list[str]:
        wrong = site.kind.rank_problems(site.module, site.param, self.rank(site))
        if self.dropout and not site.kind.drops:
            wrong.append(f"the input of a {site.kind.name} cannot be dropped: set dropout=0 or leave it out with exclude=")
        if self.up_bias and not site.kind.takes_bias:
            wrong.append(f"a {site.kind.name} takes no bias: set up_bias=False")
        return wrong or init_problems(self.init, site, self)

    def check_all(self, sites: list[Site]) -> list[str]:
        names = [s.path for s in sites]
        return [
            f"{option}[{pattern!r}] fits none of the {len(sites)} modules; closest: {closest(pattern, names)}"
            for option in ("rank_pattern", "alpha_pattern")
            for pattern in (getattr(self, option) or {})
            if not any(matches(pattern, s.path, s.module, set()) for s in sites)
        ]

    def build(self, site: Site) -> LoRAOp:
        op = LoRAOp(site, self.rank(site), self.scale(site), self.dropout, self.up_bias)
        if not site.blank:
            initialise(self.init, op, site, self)
        return op


def _by_pattern(patterns: Any, site: Site, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if matches(pattern, site.path, site.module, set()):
            return float(value)
    return default
