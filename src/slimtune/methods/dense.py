"""Fully trained modules: W' = W + D and b' = b + d, both deltas dense and zero at the start.

Cost: as many parameters as the module has; the delta form lets it merge, subtract, sum and differ by row like any other op.
In files the full weight stands (the reference library's `modules_to_save`), so that it fits a head that starts at random.
Choose it when a whole module must change, such as a new head, or as the yardstick for everything smaller.
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
    linear_in = {"D": 0.0, "d": 0.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.D = nn.Parameter(torch.zeros(site.shape, device=site.device, dtype=site.dtype))
        b = site.kind.bias(site.module, site.param)
        self.d = None if b is None else nn.Parameter(torch.zeros(b.shape, device=site.device, dtype=site.dtype))

    def delta(self) -> Tensor:
        return self.D

    def by_rows(self) -> bool:
        return True

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        return W + self.D[at].to(device=W.device, dtype=W.dtype)

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        out = self.kind.apply(x, cast(self.D, y), host)
        return out if self.d is None else out + self.kind.along_output(cast(self.d, y), out)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if self.d is None or b is None else b + self.d.to(device=b.device, dtype=b.dtype)

    # ---- files: the full weight and bias, named and shaped as the module itself stores them -------------------------
    def export(self, module: nn.Module) -> dict[str, Tensor]:
        base, b = self._base(module)
        with torch.no_grad():
            out = {self._name(module, base, self.param): self._native(module, base.to(self.D.dtype) + self.D)}
            if b is not None and self.d is not None:
                out[self._name(module, b, f"{self.param}_bias")] = b.to(self.d.dtype) + self.d
        return out

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        base, b = self._base(module)
        shapes = {self._name(module, base, self.param): tuple(self._native(module, self.D.detach()).shape)}
        return shapes | ({self._name(module, b, f"{self.param}_bias"): tuple(b.shape)} if b is not None and self.d is not None else {})

    def reset_from(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        base, b = self._base(module)
        with torch.no_grad():
            full = self._native(module, tensors[self._name(module, base, self.param)])  # a transposition is its own inverse
            self.D.copy_(minus(full.to(self.D.device), base, self.D.dtype))
            if b is not None and self.d is not None:
                self.d.copy_(minus(tensors[self._name(module, b, f"{self.param}_bias")].to(self.d.device), b, self.d.dtype))

    def _base(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        return self.kind.read(module, self.param).detach(), self.kind.bias(module, self.param)

    def _name(self, module: nn.Module, t: Tensor, otherwise: str) -> str:
        if isinstance(module.__dict__.get(self.param), Tensor):  # computed (old weight norm, pruning): no parameter is it, whatever its memory
            return otherwise
        own = (n for n, _ in module.named_parameters() if not n.startswith("slim."))
        same = (n for n in own if (p := module.get_parameter(n)).data_ptr() == t.data_ptr() and p.numel() == t.numel() > 0)
        return next(same, otherwise)

    def _native(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Turn a weight between canonical form and the form its module stores (transposed or not)."""
        own, read = module._parameters.get(self.param), self.kind.read(module, self.param)
        if own is None or own.data_ptr() != read.data_ptr() or (own.shape == read.shape and own.stride() == read.stride()):
            return weight
        return weight.transpose(-1, -2)


def minus(full: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a delta with base + delta == full to the last bit wherever there is one, so that saving again gives the same bytes."""
    full, base = full.to(dtype), base.to(dtype)
    delta = (full.double() - base.double()).to(dtype)
    for towards in (torch.inf, -torch.inf):
        near = torch.nextafter(delta, torch.full_like(delta, towards))
        delta = torch.where((base + delta != full) & (base + near == full), near, delta)
    return delta


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
