"""RMSNorm that keeps only its input and the inverse root: y = gain * x / sqrt(mean(x^2) + eps), with the gain frozen.

Paper: arXiv 1910.07467. Written by hand because autograd keeps the float32 copies of x, of x^2 and of the normalised x; here x (which
the residual stream keeps anyway) and one number per token stay. `style` says where the rounding to the data's type happens.

Projections that read one norm ask for its output one after the other in backward: it is made once for all of them, and let go of when a
norm's own backward or forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.kernels.recipe import Last, mark

_LAST = Last()


def _styled(x: Tensor, rstd: Tensor, gain: Tensor, style: str, wide: Tensor | None = None) -> Tensor:
    """Return the norm's output; `wide`, a copy of x in rstd's type, is written over."""
    normal = x * rstd if x.dtype == rstd.dtype else (x.to(rstd.dtype) if wide is None else wide).mul_(rstd)
    if style == "llama":  # gain * round(x_hat)
        rounded = normal.to(x.dtype)
        return rounded.mul_(gain) if gain.dtype == x.dtype else gain * rounded
    if style == "gemma":  # round(x_hat * (1 + gain))
        return normal.mul_(1.0 + gain.to(normal.dtype)).to(x.dtype)
    return normal.mul_(gain.to(normal.dtype)).to(x.dtype)  # "float": round(gain * x_hat)


STYLES = ("llama", "gemma", "float")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, style: str) -> tuple[Tensor, Tensor]:
        _LAST.let_go()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # [n, 1]; in the models' own order of operations: equal to the bit
        ctx.save_for_backward(x, rstd, gain)
        ctx.style = style
        ctx.mark_non_differentiable(rstd)
        return _styled(x, rstd, gain, style, wide), rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
        _LAST.let_go()
        x, rstd, gain = ctx.saved_tensors
        w = gain.to(rstd.dtype)
        gw = g.to(rstd.dtype) * ((1.0 + w) if ctx.style == "gemma" else w)  # gradient of x_hat
        normal = x * rstd if x.dtype == rstd.dtype else x.to(rstd.dtype).mul_(rstd)
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
        made: Tensor = _LAST.of((x, rstd, gain), self.style, lambda: _styled(x, rstd, gain, self.style))
        return made
