"""RMSNorm that keeps only its input and the inverse root: y = gain * x / sqrt(mean(x^2) + eps), with the gain frozen.

Paper: arXiv 1910.07467. Written by hand because autograd keeps the float32 copies of x, of x^2 and of the normalised x; here x (which
the residual stream keeps anyway) and one number per token stay. `style` says where the rounding to the data's type happens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.kernels.recipe import mark


def _styled(x: Tensor, rstd: Tensor, gain: Tensor, style: str) -> Tensor:
    normal = x.float() * rstd if x.dtype != torch.float64 else x * rstd
    if style == "llama":  # gain * round(x_hat)
        return gain * normal.to(x.dtype)
    if style == "gemma":  # round(x_hat * (1 + gain))
        return (normal * (1.0 + gain.to(normal.dtype))).to(x.dtype)
    return (gain.to(normal.dtype) * normal).to(x.dtype)  # "float": round(gain * x_hat)


STYLES = ("llama", "gemma", "float")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, style: str) -> tuple[Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [n, 1]
        ctx.save_for_backward(x, rstd, gain)
        ctx.style = style
        ctx.mark_non_differentiable(rstd)
        return _styled(x, rstd, gain, style), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
        x, rstd, gain = ctx.saved_tensors
        wide = x if x.dtype == torch.float64 else x.float()
        w = gain.to(wide.dtype)
        gw = g.to(wide.dtype) * ((1.0 + w) if ctx.style == "gemma" else w)  # gradient of x_hat
        normal = wide * rstd
        mean = (gw * normal).mean(-1, keepdim=True)
        dx = gw.addcmul_(normal, mean, value=-1).mul_(rstd)  # rstd (gw - x_hat mean(gw x_hat))
        return dx.to(x.dtype), None, None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float, style: str) -> Tensor:
    """Return the norm of x [..., d], marked so that a kernel that would keep it can make it again.

    Args:
        gain: [d], frozen.
        eps: added to the mean square.
        style: "llama", "gemma" or "float": the order of scaling and rounding.
    """
    y, rstd = _RMSNorm.apply(x, gain, eps, style)
    return mark(y, _Remake(style), x, rstd, gain)


class _Remake:
    def __init__(self, style: str) -> None:
        self.style = style

    def __call__(self, x: Tensor, rstd: Tensor, gain: Tensor) -> Tensor:
        return _styled(x, rstd, gain, self.style)
