"""Cross entropy of a frozen linear head, without ever holding the logits of all rows.

Only supervised rows go through the head; they go in chunks, and each chunk's gradient with respect to its input is computed at once in
forward, so that [chunk, V] is all that lives of the logits, and [m, d] is all that is kept for backward.

Exact to the plain computation: logits in the data's type, then float32, then log-softmax; sums over chunks are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float, softcap: float, chunk: int,
        wide_type: torch.dtype,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=wide_type, device=hidden.device)
        need = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if need else None
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk]
            t = target[start : start + chunk]
            logits = F.linear(h, weight, bias)  # [c, d] @ [d, V] -> [c, V]
            wide = logits.to(total.dtype)
            capped = softcap * torch.tanh(wide / softcap) if softcap else wide
            logp = F.log_softmax(capped, -1)
            picked = logp.gather(-1, t[:, None]).squeeze(-1)
            total -= picked.sum() * (1.0 - smoothing)
            if smoothing:
                total -= logp.mean(-1).sum() * smoothing
            if grad is not None:
                d = logp.exp_()  # softmax
                d.scatter_add_(-1, t[:, None], torch.full_like(picked, -(1.0 - smoothing))[:, None])
                if smoothing:
                    d -= smoothing / d.shape[-1]
                if softcap:
                    d *= 1.0 - (capped / softcap) ** 2
                grad[start : start + chunk] = d.to(hidden.dtype) @ weight  # [c, V] @ [V, d] -> [c, d]
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype), None, None, None, None, None, None, None


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, smoothing: float = 0.0, softcap: float = 0.0, chunk: int = 256,
    wide_type: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Return the sum over rows of the cross entropy of softmax(hidden W^T + bias) against `target`.

    Args:
        hidden: [m, d], supervised rows only.
        weight, bias: [V, d] and [V] or None, frozen.
        target: [m], class numbers.
        smoothing: label smoothing in [0, 1].
        softcap: c of logits c tanh(logits / c), 0 for none.
        chunk: rows per product.
        wide_type: type of the softmax and the sum (transformers computes losses in float32).
    """
    return _HeadLoss.apply(hidden, weight, bias, target, smoothing, softcap, chunk, wide_type)
