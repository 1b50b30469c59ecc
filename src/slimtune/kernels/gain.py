"""A gain for each output, in place: y_i <- g_i y_i + b_i, keeping the result instead of what was before it.

The result is what the next layer keeps anyway, so the step costs no memory of its own; what was before it is (y_i - b_i) / g_i in backward:

    dL/dg_i = sum_n (dL/dy_ni) (y_ni - b_i) / g_i,   0 where g_i = 0 exactly,   dL/dz = g dL/dy

FLOPs: n b forward, 3 n b backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Gain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        z.mul_(gain.to(z.dtype))
        if bias is not None:
            z.add_(bias.to(z.dtype))
        ctx.mark_dirty(z)
        ctx.save_for_backward(z, gain, bias)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        y, gain, bias = ctx.saved_tensors
        d_gain = None
        if ctx.needs_input_grad[1]:
            flat = g.reshape(-1, g.shape[-1])
            total = (flat * y.reshape(flat.shape)).sum(0).to(gain.dtype)  # torch accumulates halves in float32; asking for a wide sum copies first
            if bias is not None:
                total = total - flat.sum(0).to(gain.dtype) * bias.to(gain.dtype)
            d_gain = torch.where(gain == 0, 0.0, total / torch.where(gain == 0, 1.0, gain))
        return g * gain.to(g.dtype) if ctx.needs_input_grad[0] else None, d_gain, None


def scale_outputs(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain * z + bias, written into z.

    Args:
        z: [..., b], fresh: nobody else reads it, and what made it does not need it.
        gain: [b].
        bias: [b] or None; it gets no gradient.
    """
    y: Tensor = _Gain.apply(z, gain, bias)
    y.slim_kept = True  # type: ignore[attr-defined]
    return y


def is_kept(y: Tensor) -> bool:
    """Tell whether backward needs y as it is, so that nothing may be written into it."""
    return "slim_kept" in y.__dict__
