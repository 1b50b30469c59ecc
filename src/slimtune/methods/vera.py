"""VeRA: dW = diag(lb) B diag(ld) A with one random, frozen A and B for all layers; only the two vectors train.

Paper: arXiv 2310.11454. A [r, max a] and B [max b, r] are sliced to each layer and kept as a seed: they are made again on load.
Cost: r + b parameters per site and one shared A, B per adapter. A product like LoRA's with rank r (usually 256).
Choose it when thousands of adapters must be stored: a file holds two vectors a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.shared import HeldMatrix, RandomMatrix, SharedMatrix
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.kernels.dropout import dropout
from slimtune.kernels.lowrank import add_low_rank, fusing


class VeRAOp(Additive):
    """d [r] and l [b] over the adapter's shared A [r, max a] and B [max b, r]."""

    roles = {"d": "gain", "l": "gain"}

    def __init__(self, site: Site, A: SharedMatrix, B: SharedMatrix, d_start: float, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.shared_A, self.shared_B, self.a, self.b, self.dropout = A, B, site.a, site.b, dropout
        self.d = nn.Parameter(torch.full((A.shape[0],), d_start, device=site.device, dtype=site.dtype))
        self.l = nn.Parameter(torch.zeros(site.b, device=site.device, dtype=site.dtype))
        if not site.blank:
            self.factors()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (diag(d) A, diag(l) B) of this layer."""
        A, B = self.shared_A.at(self.d)[:, : self.a], self.shared_B.at(self.l)[: self.b]
        return self.d[:, None] * A, self.l[:, None] * B

    def delta(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def low_rank(self) -> tuple[Tensor, Tensor, float, float]:
        return *self.factors(), 1.0, self.dropout if self.training else 0.0

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        if y.dtype != x.dtype or not fusing(y):
            return super().add(x, y, host, w)
        A, B, scale, p = self.low_rank()
        return add_low_rank(y, x, A, B, scale if w is None else float(w), p)

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        A, B = self.factors()
        x = x if self.dropout == 0 or not self.training else dropout(x, self.dropout)
        return self.kind.up(self.kind.down(x, cast(A, y), host), cast(B, y), host)

    # ---- files: the seed, or, where a file held other matrices than its seed gives, these ---------------------------
    def settings(self) -> dict[str, Any]:
        return {"a": self.shared_A.shape[1], "b": self.shared_B.shape[0], "drawn": isinstance(self.shared_A, RandomMatrix)}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        a, b, drawn = settings.get("a"), settings.get("b"), settings.get("drawn")
        sizes = isinstance(a, int) and isinstance(b, int) and self.a <= a < 2**24 and self.b <= b < 2**24
        if not sizes or type(drawn) is not bool or len(settings) != 3:
            raise SpecError(f"these are no settings of a VeRA here: {str(settings)[:200]}", where=str(site))
        a, b, r = int(a or 0), int(b or 0), self.shared_A.shape[0]
        if drawn:
            assert isinstance(self.shared_A, RandomMatrix), "a spec builds from its seed"
            self.shared_A, self.shared_B = shared(site, r, a, b, self.shared_A.seed)
            self.factors()
        else:
            self.shared_A, self.shared_B = site.shared.setdefault(f"vera held {r} {a} {b}", (HeldMatrix((r, a)), HeldMatrix((b, r))))

    def export(self, module: nn.Module) -> dict[str, Tensor]:
        held = {"A": self.shared_A, "B": self.shared_B}
        return super().export(module) | {k: v.source() for k, v in held.items() if isinstance(v, HeldMatrix)}

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        held = {"A": self.shared_A, "B": self.shared_B}
        own = {"d": tuple(self.d.shape), "l": tuple(self.l.shape)}
        return own | {k: v.shape for k, v in held.items() if isinstance(v, HeldMatrix)}

    def reset_from(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        for name, matrix in (("A", self.shared_A), ("B", self.shared_B)):
            if isinstance(matrix, HeldMatrix):
                matrix.fill(tensors[name])
        super().reset_from(tensors, module)
        self.factors()


def shared(site: Site, r: int, a: int, b: int, seed: int) -> tuple[RandomMatrix, RandomMatrix]:
    """Return the adapter's one A [r, a] and B [b, r], drawn one after the other as the reference library draws them."""
    key = f"vera {r} {a} {b} {seed}"
    if key not in site.shared:
        A = RandomMatrix((r, a), seed)
        site.shared[key] = (A, RandomMatrix((b, r), seed, after=A))
    found: tuple[RandomMatrix, RandomMatrix] = site.shared[key]
    return found


@register("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Spec):
    """Vector-based random matrix adaptation (arXiv 2310.11454).

    Args:
        r: rank of the shared random matrices.
        d_start: start of the vector on the rank.
        seed: of the shared matrices.
        dropout: probability of dropping an input while training.

    Example:
        >>> import slimtune as st
        >>> st.VeRA(r=64).seed
        0
    """

    r: int = 256
    d_start: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    def problems(self) -> list[str]:
        wrong = [] if self.r >= 1 else [f"r must be at least 1, not {self.r}"]
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed must be in [0, 2^63), not {self.seed}")
        return wrong + ([] if 0 <= self.dropout < 1 else [f"dropout must be in [0, 1), not {self.dropout}"])

    def check(self, site: Site) -> list[str]:
        return [] if site.kind.name == "linear" else [f"VeRA's shared matrices fit linear layers only, not {site.kind.noun}"]

    def prepare(self, sites: list[Site], shared: dict[str, Any]) -> None:
        shared["widths"] = (max(s.a for s in sites), max(s.b for s in sites))

    def build(self, site: Site) -> VeRAOp:
        a, b = site.shared.get("widths", (site.a, site.b))
        return VeRAOp(site, *shared(site, self.r, a, b, self.seed), self.d_start, self.dropout)
