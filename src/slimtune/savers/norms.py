"""Lean norms: RMSNorm in one function; LayerNorm as it is (torch keeps little), but marked as remakeable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.kernels.lowrank import fusing
from slimtune.kernels.recipe import mark
from slimtune.kernels.rmsnorm import STYLES, rms_norm


class LeanRMSNorm:
    """Mixin of a recognised RMSNorm."""

    rank = 2
    slim_norm: tuple[float, str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        if args or kwargs or weight.requires_grad or not torch.is_grad_enabled() or not x.requires_grad or not fusing(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return rms_norm(x, weight, *self.slim_norm)


class LeanLayerNorm:
    """Mixin of nn.LayerNorm: the same computation; its output can be made again from its input."""

    rank = 2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]
        if torch.is_grad_enabled() and y.requires_grad and fusing(x):
            mark(y, _LayerNorm(self.normalized_shape, self.weight, self.bias, self.eps), x)  # type: ignore[attr-defined]
        return y


class _LayerNorm:
    def __init__(self, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.args = (shape, None if weight is None else weight.detach(), None if bias is None else bias.detach(), eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, *self.args)


def recognise_rms(module: nn.Module) -> tuple[float, str] | None:
    """Return (eps, style) if `module` is bit for bit one of the known RMSNorms, proven on random data; None otherwise."""
    weight = module._parameters.get("weight")
    if "rmsnorm" not in type(module).__name__.lower() and not type(module).__name__.endswith("T5LayerNorm"):
        return None
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1 or module._modules or weight.device.type == "meta":
        return None
    eps = next((v for k, v in module.__dict__.items() if k in {"variance_epsilon", "eps"} and isinstance(v, float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator).to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        try:
            want = module(x)
        except Exception:  # a module of this name with another calling convention: leave it alone
            return None
        for style in STYLES:
            if isinstance(want, Tensor) and torch.equal(rms_norm(x, weight, eps, style), want):
                return eps, style
    return None
