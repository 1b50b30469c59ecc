"""One product for each expert: y[i] = W[e(i)] x[i] for rows sorted by expert, as one operator that torch.compile need not look into.

FLOPs 2 S a b for S rows; no memory beyond the output, whatever the number of experts. Only what asks for a gradient gets one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("slimtune::grouped", mutates_args=())
def grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """Return x [S, a] times the transposed matrix of each row's expert.

    Args:
        x: [S, a], rows sorted by expert; rows after the last end belong to none and give zero.
        W: [E, b, a], possibly a transposed view.
        ends: [E], where the rows of each expert end.
    """
    y = x.new_zeros(x.shape[0], W.shape[1])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], W[e].t(), out=y[start:end])
        start = end
    return y


@grouped.register_fake
def _(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1])


@torch.library.custom_op("slimtune::grouped_weight_grad", mutates_args=())
def grouped_weight_grad(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient [E, b, a] of W from that of the output g [S, b]."""
    d = g.new_zeros(ends.shape[0], g.shape[1], x.shape[1])
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(g[start:end].t(), x[start:end], out=d[e])
        start = end
    return d


@grouped_weight_grad.register_fake
def _(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return g.new_empty(ends.shape[0], g.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, W, ends = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W, ends)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, W, ends = ctx.saved_tensors
    dx = grouped(g, W.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    dW = grouped_weight_grad(g, x, ends) if ctx.needs_input_grad[1] else None
    return dx, dW, None


grouped.register_autograd(_backward, setup_context=_keep)


def each(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """Return `grouped` in one data type: autocast's if it is on, else that of x."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return grouped(x.to(dtype), W.to(dtype), ends)  # type: ignore[no-any-return]
