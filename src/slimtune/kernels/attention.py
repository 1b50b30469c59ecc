"""Scaled dot-product attention that keeps q, k and v, in plain matrix products and torch's fused softmax.

out = softmax(s q k^T + mask) v, the softmax in float32 inside and rounded to the data's type (as transformers' eager attention). Torch's fused
attention kernel has a slow backward on CPUs, and the plain form keeps all probabilities; here backward makes them again, block of
queries by block of queries, and a causal block never looks at later keys.

Grouped-query attention needs no copies of keys and values: the query heads of one group are more rows of the same product.
FLOPs: forward 4 H T S D, backward 10 H T S D (little more than half of it when causal); temporaries [B H, block, S].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64


class _Blocks:
    """The blocks of one call: queries i:j against the keys they may see."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
        self.B, H, self.T, self.D = q.shape
        self.KV, self.S = k.shape[1], k.shape[2]
        self.g = H // self.KV
        self.q = q.view(self.B, self.KV, self.g, self.T, self.D)
        self.k, self.v = k.reshape(self.B * self.KV, self.S, self.D), v.reshape(self.B * self.KV, self.S, self.D)
        self.mask, self.causal, self.scale = mask, causal and mask is None, scale
        self.late: dict[int, Tensor] = {}

    def __iter__(self) -> Any:
        """Yield (i, j, keys seen); query i stands at key position S - T + i."""
        for i in range(0, self.T, BLOCK):
            j = min(i + BLOCK, self.T)
            yield i, j, self.S - self.T + j if self.causal else self.S

    def rows(self, t: Tensor, i: int, j: int) -> Tensor:
        """Return queries i:j of [B, KV, g, T, D] as [B KV, g (j - i), D]."""
        return t[:, :, :, i:j].reshape(self.B * self.KV, self.g * (j - i), self.D)

    def back(self, t: Tensor, i: int, j: int) -> Tensor:
        """Undo `rows`."""
        return t.view(self.B, self.KV, self.g, j - i, self.D)

    def probabilities(self, q: Tensor, i: int, j: int, seen: int) -> Tensor:
        """Return softmax(s q k^T + mask) [B KV, g (j - i), seen] of one block of queries [B KV, g (j - i), D]."""
        n, t = self.B * self.KV, j - i
        scores = torch.baddbmm(self.added(q, i, j, seen), q, self.k[:, :seen].transpose(1, 2), alpha=self.scale)
        return torch.softmax(scores.view(n, self.g * t, seen), -1)

    def added(self, q: Tensor, i: int, j: int, seen: int) -> Tensor:
        """Return what is added to the scores, broadcastable to [B KV, g t, seen]."""
        t = j - i
        if self.mask is not None:
            m = self.mask[:, :, i:j, :seen]
            if m.dtype == torch.bool:
                m = q.new_zeros(m.shape).masked_fill_(~m, torch.finfo(q.dtype).min)
            m = m.unsqueeze(2) if m.shape[1] == 1 else m.view(m.shape[0], self.KV, self.g, t, seen)
            return m.expand(self.B, self.KV, self.g, t, seen).reshape(self.B * self.KV, self.g * t, seen).to(q.dtype)
        if not self.causal:
            return q.new_zeros(())
        if t not in self.late:  # earlier keys are all seen; only the block's own square, at the right end, hides something
            square = q.new_full((t, t), float("-inf")).triu_(1)
            self.late[t] = torch.cat([q.new_zeros(t, self.S - t), square], 1).repeat(self.g, 1)
        return self.late[t][:, self.S - seen :]


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    blocks = _Blocks(q, k, v, mask, causal, scale)
    out = q.new_empty(blocks.B, blocks.T, blocks.KV, blocks.g, blocks.D)
    into = out.permute(0, 2, 3, 1, 4)  # [B, KV, g, T, D]
    for i, j, seen in blocks:
        p = blocks.probabilities(blocks.rows(blocks.q, i, j), i, j, seen)
        into[:, :, :, i:j] = blocks.back(torch.bmm(p, blocks.v[:, :seen]), i, j)
    return out.view(blocks.B, blocks.T, -1, blocks.D)


def _backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _Blocks(q, k, v, mask, causal, scale)
    d_rows = d_out.view(blocks.B, blocks.T, blocks.KV, blocks.g, blocks.D).permute(0, 2, 3, 1, 4)
    dq = torch.empty_like(blocks.q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    for i, j, seen in blocks:
        qb, db = blocks.rows(blocks.q, i, j), blocks.rows(d_rows, i, j)
        p = blocks.probabilities(qb, i, j, seen)
        dv[:, :seen].baddbmm_(p.transpose(1, 2), db)
        dp = torch.bmm(db, blocks.v[:, :seen].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, :, :, i:j] = blocks.back(torch.bmm(ds, blocks.k[:, :seen]).mul_(scale), i, j)
        dk[:, :seen].baddbmm_(ds.transpose(1, 2), qb, alpha=scale)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal, ctx.scale = causal, scale
        return _forward(q, k, v, mask, causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, mask = ctx.saved_tensors
        return (*_backward(d_out, q, k, v, mask, ctx.causal, ctx.scale), None, None, None)


# The same as operators that a compiler does not look into: traced, their blocks would be kept for backward.
@torch.library.custom_op("slimtune::attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return _forward(q, k, v, mask, causal, scale)


@torch.library.custom_op("slimtune::attention_backward", mutates_args=())
def _opaque_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(d_out.contiguous(), q, k, v, mask, causal, scale)


@_opaque.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@_opaque_backward.register_fake
def _shapes(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _way_back(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    return (*_opaque_backward(d_out, *ctx.saved_tensors, *ctx.how), None, None, None)


_opaque.register_autograd(_way_back, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return attention of queries q [B, H, T, D] over keys and values k, v [B, KV, S, D] as [B, T, H, D].

    Args:
        mask: bool (true = seen) or float (added), [B or 1, 1 or H, T, S], or None.
        causal: without a mask: query i sees keys up to S - T + i.
        scale: s.
    """
    return (_opaque if torch.compiler.is_compiling() else _Attention.apply)(q, k, v, mask, causal, scale)
