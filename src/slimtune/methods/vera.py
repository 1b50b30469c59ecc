"""VeRA: dW = diag(lb) B diag(ld) A with one random, frozen A and B for all layers; only the two vectors train.

Paper: arXiv 2310.11454. A [r, max a] and B [max b, r] are sliced to each layer and kept as a seed: they are made again on load.
Cost: r + b parameters per site and one shared A, B per adapter. A product like LoRA's with rank r (usually 256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.shared import RandomMatrix
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.kernels.lowrank import add_low_rank, fusing


class VeRAOp(Additive):
    """d [r] and l [b] over the adapter's shared A [r, max a] and B [max b, r]."""

    roles = {"d": "gain", "l": "gain"}

    def __init__(self, site: Site, A: RandomMatrix, B: RandomMatrix, d_start: float) -> None:
        super().__init__(site)
        self.shared_A, self.shared_B, self.a, self.b = A, B, site.a, site.b
        self.d = nn.Parameter(torch.full((A.shape[0],), d_start, device=site.device, dtype=site.dtype))
        self.l = nn.Parameter(torch.zeros(site.b, device=site.device, dtype=site.dtype))
        self.factors()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (diag(d) A, diag(l) B) of this layer."""
        A, B = self.shared_A.at(self.d)[:, : self.a], self.shared_B.at(self.l)[: self.b]
        return self.d[:, None] * A, self.l[:, None] * B

    def delta(self) -> Tensor:
        A, B = self.factors()
        return B @ A

    def low_rank(self) -> tuple[Tensor, Tensor, float, float]:
        return *self.factors(), 1.0, 0.0

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        if y.dtype != x.dtype or not fusing(y):
            return super().add(x, y, host, w)
        return add_low_rank(y, x, *self.factors(), 1.0 if w is None else float(w))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        A, B = self.factors()
        return self.kind.up(self.kind.down(x, cast(A, y), host), cast(B, y), host)

    def settings(self) -> dict[str, Any]:
        return {"a": self.shared_A.shape[1], "b": self.shared_B.shape[0]}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        a, b = settings.get("a"), settings.get("b")
        if not (isinstance(a, int) and isinstance(b, int) and a >= self.a and b >= self.b and max(a, b) < 2**24):
            raise SpecError(f"these are no settings of a VeRA here: {str(settings)[:200]}", where=str(site))
        r, seed = self.shared_A.shape[0], self.shared_A.seed
        if (self.shared_A.shape[1], self.shared_B.shape[0]) != (a, b):
            self.shared_A, self.shared_B = shared(site, r, a, b, seed)
            self.factors()


def shared(site: Site, r: int, a: int, b: int, seed: int) -> tuple[RandomMatrix, RandomMatrix]:
    """Return the adapter's one A [r, a] and B [b, r]."""
    key = f"vera {r} {a} {b} {seed}"
    if key not in site.shared:
        site.shared[key] = (RandomMatrix((r, a), seed), RandomMatrix((b, r), seed + 1))
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

    Example:
        >>> import slimtune as st
        >>> st.VeRA(r=64).seed
        0
    """

    r: int = 256
    d_start: float = 0.1
    seed: int = 0

    def problems(self) -> list[str]:
        return [] if self.r >= 1 else [f"r must be at least 1, not {self.r}"]

    def check(self, site: Site) -> list[str]:
        return [] if site.kind.name == "linear" else [f"VeRA's shared matrices fit linear layers only, not a {site.kind.name}"]

    def prepare(self, sites: list[Site], shared: dict[str, Any]) -> None:
        shared["widths"] = (max(s.a for s in sites), max(s.b for s in sites))

    def build(self, site: Site) -> VeRAOp:
        a, b = site.shared.get("widths", (site.a, site.b))
        return VeRAOp(site, *shared(site, self.r, a, b, self.seed), self.d_start)
