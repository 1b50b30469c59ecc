"""LoRA: y += s (x A^T) B^T, the weight delta s B A of rank r.

Paper: arXiv 2106.09685; rank-stabilised scale alpha / sqrt(r): arXiv 2312.03732; A frozen (`freeze="A"`): LoRA-FA, arXiv 2308.03303.
Cost per linear map [b, a]: r (a + b) parameters, 2 n r (a + b) FLOPs forward; activations kept: x (shared) and h [n, r]; with A
frozen r b parameters, and h only.
Works on linear maps, convolutions, embeddings, attention projections and 3-D expert weights. Cannot: nothing known.

Dropout while training, with probability p of dropping and the rest times 1 / (1 - p), so that the mean is the output without:
    element  each entry of x by itself (the paper)
    column   inputs, the same for all tokens: x_j for all of them (arXiv 2403.00812's column-wise form); a mask of a numbers, not n a
    rank     rank directions, the same for all tokens: h_k
    module   the whole adapter (stochastic depth, arXiv 1603.09382)
Choose it when nothing speaks for another one: it is the best tested, merges, and other programs read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError, closest
from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.core.targets import matches
from slimtune.initialise import INITS, STUDIES, init_problems, initialise
from slimtune.kernels.dropout import dropout
from slimtune.kernels.lowrank import add_low_rank, fusing

DROPOUTS = ("element", "column", "rank", "module")


class LoRAOp(Additive):
    """A [r, a] and B [b, r]; with `A0`, `B0` the delta is s (B A - B0 A0): zero at the start, whatever A and B began as.

    Args:
        frozen_down: A gets no gradient (LoRA-FA).
    """

    roles = {"A": "down", "B": "up", "up_bias": "bias"}
    A: Tensor
    B: nn.Parameter

    def __init__(
        self,
        site: Site,
        r: int,
        scale: float,
        dropout: float = 0.0,
        up_bias: bool = False,
        *,
        dropout_kind: str = "element",
        frozen_down: bool = False,
    ) -> None:
        super().__init__(site)
        self.r, self.scale, self.dropout, self.dropout_kind = r, scale, dropout, dropout_kind
        shape_a, shape_b = site.kind.factor_shapes(site.module, site.param, r)
        A = torch.empty(shape_a, device=site.device, dtype=site.dtype)
        if frozen_down:
            self.register_buffer("A", A)
        else:
            self.A = nn.Parameter(A)
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

    def factors(self, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the (A, B) of the whole delta / s, frozen part included: rank r or 2 r.

        Args:
            keep: what A is multiplied with, see `mask`.
        """
        masked = isinstance(keep, Tensor)
        own, buffers = self._parameters, self._buffers  # found faster than attributes: this runs for every token written
        A: Tensor = own["A"] if "A" in own else buffers["A"]  # type: ignore[assignment]
        if masked:
            A = A * keep
        if buffers["A0"] is None:
            return A, own["B"]  # type: ignore[return-value]
        return self.kind.beside(A, self.B, self.A0 * keep if masked else self.A0, -self.B0)

    def mask(self) -> Tensor | float:
        """Return what A is multiplied with in this call: 1, or while training a new mask of columns, ranks or everything.

        Drawn from torch's generator, which checkpointing puts back before it runs a forward again.
        """
        if self.dropout == 0 or not self.training or self.dropout_kind == "element":
            return 1.0
        shape = [1] * self.A.dim()
        if self.dropout_kind != "module":
            axis = self.kind.rank_axis + (self.dropout_kind == "column")
            shape[axis] = self.A.shape[axis]
        kept = torch.rand(shape, device=self.A.device) >= self.dropout
        return kept.to(self.A.dtype) / (1 - self.dropout)

    def element_dropout(self) -> float:
        """Return the probability with which entries of x are dropped now."""
        return self.dropout if self.training and self.dropout_kind == "element" else 0.0

    def delta(self) -> Tensor:
        A, B = self.factors()
        dense = self.kind.compose(A, B, self.shape)
        return self.scale * dense if torch.is_grad_enabled() else dense.mul_(self.scale)

    def weight(self, W: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not W.is_contiguous():
            return super().weight(W)
        delta = self.delta().to(device=W.device, dtype=W.dtype)  # a fresh tensor: merging takes the memory of one layer more, not of two
        return delta.add_(W) if delta.is_contiguous() else W + delta

    def by_rows(self) -> bool:
        own = type(self).delta is LoRAOp.delta and type(self).weight is LoRAOp.weight
        return own and self.kind.out_axis == 0 and len(self.shape) == 2  # the rows of B are those of the weight

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        A, B = self.factors()
        delta = self.kind.compose(A, B[at], tuple(W.shape))
        return (delta * self.scale if torch.is_grad_enabled() else delta.mul_(self.scale)).to(device=W.device, dtype=W.dtype) + W

    def pair(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A, self.scale * B

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        A, B = self.factors(self.mask())
        p = self.element_dropout()
        x = x if p == 0 else dropout(x, p)
        h = self.kind.down(x, cast(A, y), host)
        d = self.scale * self.kind.up(h, cast(B, y), host)
        return d if self.up_bias is None else d + self.kind.along_output(self.scale * cast(self.up_bias, y), d)

    def low_rank(self) -> tuple[Tensor, Tensor, float, float] | None:
        """Return (A, B, s, dropout probability now) for fused kernels, or None when the op is more than that."""
        if self.up_bias is not None or (self.training and self.dropout and self.dropout_kind != "element"):
            return None
        return *self.factors(), self.scale, self.element_dropout()

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        """Accumulate into y with one autograd function, where the map is linear and nothing else is asked for."""
        if self.up_bias is not None or self.kind.name != "linear" or y.dtype != x.dtype or not fusing(y):
            return super().add(x, y, host, w)
        A, B = self.factors(self.mask())
        return add_low_rank(y, x, A, B, self.scale if w is None else self.scale * float(w), self.element_dropout())

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
                empty = torch.empty(shape, **new)
                setattr(self, name, empty if name in self._buffers else nn.Parameter(empty))
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
        dropout: probability of dropping while training.
        dropout_kind: what is dropped: "element", "column", "rank" or "module" (see the module's text).
        freeze: "A" leaves A as it starts (LoRA-FA): no input needs to be kept for backward. Default: "none".
        init: how A and B start; see `slimtune.initialise`. None of them changes the base. "eva", "corda", "corda_kpm" and "lora_ga" look at
            a few batches: `st.attach(model, spec, data=batches)`.
        init_batches: how many batches of `data` they look at, at most.
        rho: "eva" may give a module up to rho times its rank, taken from others (1: no redistribution).
        up_bias: train a bias [b] on the up projection.
        rank_pattern, alpha_pattern: target pattern -> rank / alpha, for modules that differ; the first match counts.
        loftq_source: folder with the original, unquantised safetensors (init="loftq").
        targets, layers, exclude, train_modules: see `Spec`.

    Example:
        >>> import slimtune as st
        >>> st.LoRA(r=16, targets=("q_proj", "v_proj"), rank_pattern={"layers.0.*": 4}).r
        16
    """

    op: ClassVar[type[LoRAOp]] = LoRAOp  # that it builds

    r: int = 8
    alpha: float | None = None
    rank_stabilised: bool = False
    dropout: float = 0.0
    dropout_kind: str = "element"
    freeze: str = "none"
    init: str = "kaiming"
    init_batches: int = 8
    rho: float = 2.0
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
        if self.dropout_kind not in DROPOUTS:
            wrong.append(f"dropout_kind must be one of {', '.join(DROPOUTS)}, not {self.dropout_kind!r}")
        if self.freeze not in ("none", "A"):
            wrong.append(f"freeze must be none or A, not {self.freeze!r}")
        if self.init not in INITS:
            wrong.append(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        if self.init == "loftq" and not self.loftq_source:
            wrong.append('init="loftq" needs loftq_source=, the folder of the unquantised model')
        if self.init_batches < 1:
            wrong.append(f"init_batches must be at least 1, not {self.init_batches}")
        if self.rho < 1:
            wrong.append(f"rho must be at least 1, not {self.rho}")
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
        if self.dropout and self.dropout_kind == "element" and not site.kind.drops:
            wrong.append(f"the input of {site.kind.noun} cannot be dropped: set dropout=0 or leave it out with exclude=")
        elif self.dropout and site.kind.name == "attention":
            wrong.append("the projections of an attention module run on one weight, where nothing can be dropped: set dropout=0")
        if self.up_bias and not site.kind.takes_bias:
            wrong.append(f"{site.kind.noun} takes no bias: set up_bias=False")
        return wrong or init_problems(self.init, site, self)

    def check_all(self, sites: list[Site]) -> list[str]:
        names = [s.path for s in sites]
        return [
            f"{option}[{pattern!r}] fits none of the {len(sites)} modules; closest: {closest(pattern, names)}"
            for option in ("rank_pattern", "alpha_pattern")
            for pattern in (getattr(self, option) or {})
            if not any(matches(pattern, s.path, s.module, set()) for s in sites)
        ]

    def wants_data(self) -> bool:
        return self.init in STUDIES

    def study(self, model: nn.Module, sites: list[Site], data: Iterable[Any], shared: dict[str, Any]) -> list[Site]:
        """Look at the data for an initialiser, and leave out the sites that get no rank."""
        found = STUDIES[self.init](model, sites, data, self)
        shared["study"] = found
        return [site for site in sites if (site.path, site.param) in found]

    def remarks(self, adapter: Adapter) -> list[str]:
        """Return what a report should say about the ranks."""
        ops = {path: op for (path, _), op in adapter.ops.items() if isinstance(op, LoRAOp)}
        ranks = [op.r for op in ops.values()]
        usual = 8  # the default on a tiny layer is nobody's slip
        wide = [path for path, op in ops.items() if len(op.shape) == 2 and op.r > max(usual, min(op.shape))]
        more = [f"the rank is above what {len(wide)} modules can have, so a part of it is idle: {', '.join(wide[:3])}"] if wide else []
        if self.init == "eva" and ranks:
            more.append(f"EVA's ranks: {min(ranks)} to {max(ranks)} in {len(ranks)} modules, {sum(ranks)} in all")
        return more

    def build(self, site: Site) -> LoRAOp:
        found = None if site.blank else site.shared.get("study", {}).get((site.path, site.param))
        op = self.op(
            site,
            self.rank(site) if found is None else found[0].shape[0],
            self.scale(site),
            self.dropout,
            self.up_bias,
            dropout_kind=self.dropout_kind,
            frozen_down=self.freeze == "A",
        )
        if not site.blank:
            initialise(self.init, op, site, self)
        return op


def _by_pattern(patterns: Any, site: Site, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if matches(pattern, site.path, site.module, set()):
            return float(value)
    return default
