"""QA-LoRA: y += s B A pool(x), where pool adds up (or averages) the inputs of each group of g; merges exactly into a group-wise 4-bit base.

    dW[o, i] = s f (B A)[o, i // g],   A [r, a / g], B [b, r],   f = 1 for a sum (the paper), 1 / g for a mean

Paper: arXiv 2309.14717. dW is the same for all inputs of a group, so on a base W = (q - z) s_W with groups of g it is merged as
z - dW / s_W: the codes q and the scales stay, to the bit, and the merged model is still in 4 bits, without rounding (see
`ports.group_quantised`). On any other linear layer it is an additive method like any other; there, merging quantises again where the
base is quantised.
A starts uniform, within 1 / sqrt(a) for a sum, so that A pool(x) is as large as LoRA's A x and LoRA's learning rates fit; within
1 / sqrt(a / g) for a mean. B starts at zero.
Cost per map [b, a]: r (a / g + b) parameters, 2 n r (a / g + b) FLOPs; kept for backward: pool(x) [n, a / g], not x.
Cannot: sit on anything but a linear map; tell the inputs of a group apart.
Choose it when the model is served in 4 bits and the adapter must become part of it without rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.kernels.dropout import dropout

POOLS = ("sum", "mean")
GROUP = 32  # where the base has no groups of its own


class QALoRAOp(Additive):
    """A [r, a / g] and B [b, r]."""

    roles = {"A": "down", "B": "up"}

    def __init__(self, site: Site, r: int, scale: float, group: int, pool: str, dropout: float) -> None:
        super().__init__(site)
        self.r, self.scale, self.group, self.pool, self.dropout = r, scale, group, pool, dropout
        self.A = nn.Parameter(torch.empty(r, site.a // group, device=site.device, dtype=site.dtype))
        self.B = nn.Parameter(torch.zeros(site.b, r, device=site.device, dtype=site.dtype))
        if not site.blank:
            bound = 1 / math.sqrt(site.a if pool == "sum" else site.a // group)
            nn.init.uniform_(self.A, -bound, bound)

    def factor(self) -> float:
        """Return s f."""
        return self.scale / self.group if self.pool == "mean" else self.scale

    def delta(self) -> Tensor:
        return (self.factor() * (self.B @ self.A)).repeat_interleave(self.group, 1)  # [b, a / g] -> [b, a]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A.repeat_interleave(self.group, 1), self.factor() * self.B

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        x = dropout(x, self.dropout) if self.training and self.dropout else x
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1)  # [n, a] -> [n, a / g]
        h = F.linear(pooled, cast(self.A, y))  # [n, a / g] @ [a / g, r]
        return self.factor() * F.linear(h, cast(self.B, y))

    def settings(self) -> dict[str, Any]:
        return {"r": self.r, "scale": self.scale, "group": self.group, "pool": self.pool}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        r, scale, group, pool = (settings.get(k) for k in ("r", "scale", "group", "pool"))
        sound = type(r) is int and 0 < r < 2**24 and isinstance(scale, (int, float)) and type(group) is int and 0 < group <= site.a
        if not sound or site.a % group or pool not in POOLS or len(settings) != 4:  # type: ignore[operator]
            raise SpecError(f"these are no settings of a QA-LoRA here: {str(settings)[:200]}", where=str(site))
        if (r, group) != (self.r, self.group):
            self.A = nn.Parameter(self.A.new_empty(r, site.a // group))  # type: ignore[operator, arg-type]
            self.B = nn.Parameter(self.B.new_empty(site.b, r))  # type: ignore[arg-type]
        self.r, self.scale, self.group, self.pool = r, float(scale), group, pool  # type: ignore[assignment, arg-type]


@register("qa_lora")
@dataclass(frozen=True, kw_only=True)
class QALoRA(Spec):
    """Quantisation-aware low-rank adaptation (arXiv 2309.14717).

    Args:
        r: rank.
        alpha: the scale is alpha / r; default: 2 r.
        group: inputs that are pooled; default: the groups of the base's own quantisation, else 32 or the largest part of 32 that divides a.
        pool: "sum" (the paper) or "mean".
        dropout: probability of dropping an input while training.

    Example:
        >>> import slimtune as st
        >>> st.QALoRA(r=16, group=64).pool
        'sum'
    """

    r: int = 8
    alpha: float | None = None
    group: int | None = None
    pool: str = "sum"
    dropout: float = 0.0

    def problems(self) -> list[str]:
        wrong = []
        if self.r < 1:
            wrong.append(f"r must be at least 1, not {self.r}")
        if self.group is not None and self.group < 1:
            wrong.append(f"group must be at least 1, not {self.group}")
        if self.pool not in POOLS:
            wrong.append(f"pool must be one of {', '.join(POOLS)}, not {self.pool!r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), not {self.dropout}")
        return wrong

    def group_of(self, site: Site) -> int:
        """Return g at one site."""
        own: int | None = site.kind.group(site.module) if hasattr(site.kind, "group") else None
        return self.group or own or math.gcd(GROUP, site.a)

    def check(self, site: Site) -> list[str]:
        if site.kind.name != "linear":
            return [f"QA-LoRA pools the inputs of a linear layer, which {site.kind.noun} is not"]
        g = self.group_of(site)
        if site.a % g:
            return [f"group={g} does not divide the {site.a} inputs"]
        own = site.kind.group(site.module) if hasattr(site.kind, "group") else 1
        if g % own:
            return [f"group={g} is no multiple of the base's groups of {own}, so it would not merge exactly: leave group= out"]
        return []

    def build(self, site: Site) -> QALoRAOp:
        alpha = 2.0 * self.r if self.alpha is None else self.alpha
        return QALoRAOp(site, self.r, alpha / self.r, self.group_of(site), self.pool, self.dropout)
