"""Cross entropy of a frozen linear head, without ever holding the logits of all rows.

Only supervised rows go through the head; they go in chunks, and each chunk's gradient with respect to its input is computed at once in
forward, over its logits, so that [chunk, V] is all that lives of them, and [m, d] is all that is kept for backward.

Exact to the plain computation: logits in the data's type, then float32, then log-softmax; sums over chunks are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]

CACHED = 2**20  # logits that go through the softmax at a time on a CPU, so that its float32 copies stay in the cache


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, smoothing: float, softcap: float, chunk: int,
        wide_type: torch.dtype,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=wide_type, device=hidden.device)
        need = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if need else None
        block = max(1, CACHED // weight.shape[0]) if hidden.device.type == "cpu" else chunk
        chunk = min(chunk, max(1, hidden.shape[0]))
        block = min(block, chunk)
        # One room for all chunks, and one for all parts: fresh memory is dear.
        room = hidden.new_empty(chunk, weight.shape[0])
        wide = hidden.new_empty(2, block, weight.shape[0], dtype=wide_type)
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk]
            logits = room[: len(h)]
            if bias is None:
                torch.mm(h, weight.t(), out=logits)  # [c, d] @ [d, V] -> [c, V]
            else:
                torch.addmm(bias, h, weight.t(), out=logits)
            for part, t in zip(logits.split(block), target[start : start + chunk].split(block), strict=True):
                total += _part(part, t, smoothing, softcap, wide[:, : len(t)], need)
            if grad is not None:
                torch.mm(logits, weight, out=grad[start : start + chunk])  # [c, V] @ [V, d] -> [c, d]
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype), None, None, None, None, None, None, None


def _part(logits: Tensor, target: Tensor, smoothing: float, softcap: float, wide: Tensor, need: bool) -> Tensor:
    """Return the loss of some rows of logits [c, V], and write its gradient over them if there is need; `wide` [2, c, V] is room to work in."""
    capped, p = wide[0].copy_(logits), wide[1]
    if softcap:
        capped.div_(softcap).tanh_().mul_(softcap)
    torch.softmax(capped, -1, out=p)
    # log sum exp from the likeliest class, whose probability is at least 1/V: no second pass of exponentials, no underflow
    lse = capped.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
    picked = capped.gather(-1, target[:, None]) - lse
    loss = picked.sum() * (smoothing - 1.0)
    if smoothing:
        loss -= (capped.mean(-1, keepdim=True) - lse).sum() * smoothing
    if need:
        p.scatter_add_(-1, target[:, None], torch.full_like(picked, smoothing - 1.0))
        if smoothing:
            p -= smoothing / p.shape[-1]
        if softcap:
            p *= 1.0 - (capped / softcap) ** 2
        logits.copy_(p)
    return loss


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


class _AnyHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, head: Head, smoothing: float, chunk: int, wide_type: torch.dtype, *trains: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=wide_type, device=hidden.device)
        asked = [i for i, need in enumerate((ctx.needs_input_grad[0], *ctx.needs_input_grad[6:])) if need]
        sums = {i: torch.zeros_like((hidden, *trains)[i]) for i in asked}
        for start in range(0, hidden.shape[0], chunk):
            h = hidden[start : start + chunk].detach().requires_grad_(0 in asked)
            with torch.enable_grad():
                logits = head(h).to(wide_type)  # [c, d] -> [c, V]
                loss = F.cross_entropy(logits, target[start : start + chunk], reduction="sum", label_smoothing=smoothing)
            total += loss.detach()
            if asked:
                found = torch.autograd.grad(loss, [(h, *trains)[i] for i in asked])
                for i, g in zip(asked, found, strict=True):
                    if i == 0:
                        sums[0][start : start + chunk] = g
                    else:
                        sums[i] += g
        ctx.asked = list(sums)
        ctx.save_for_backward(*sums.values())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        grads = {i: t * g.to(t.dtype) for i, t in zip(ctx.asked, ctx.saved_tensors, strict=True)}
        n = len(ctx.needs_input_grad) - 6
        return (grads.get(0), None, None, None, None, None, *(grads.get(i + 1) for i in range(n)))


def any_head_loss(
    hidden: Tensor, head: Head, trains: Sequence[Tensor], target: Tensor, *, smoothing: float = 0.0, chunk: int = 256,
    wide_type: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """As `head_loss`, for a head that is adapted, trains, or does more than a linear map.

    Args:
        hidden: [m, d], supervised rows only.
        head: hidden states [c, d] -> logits [c, V], row by row; autograd is used over one chunk at a time.
        trains: what the head reads and trains; each gets its gradient, summed over chunks.
        target, smoothing, chunk, wide_type: as there.
    """
    return _AnyHeadLoss.apply(hidden, target, head, smoothing, chunk, wide_type, *trains)
