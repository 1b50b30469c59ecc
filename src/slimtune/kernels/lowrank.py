"""The additive low-rank product as one autograd function each: alone (y += s x A^T B^T), and fused with its frozen linear map.

Kept for backward: h = x A^T [n, r], references to the weights and, only if A trains, x (or what x is made of, see `recipe`): with A frozen
(LoRA-FA, arXiv 2308.03303) nothing of width a is kept. The float32 masters A and B are cast down to the data's type; activations are never
cast up. Dropout is made again from its seed. A backward that is to be differentiated again is made of plain operations.

FLOPs forward 2 n r (a + b) beside 2 n a b; backward (x and factors) 4 n r (a + b) beside 2 n a b.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from slimtune.core.errors import CapabilityError
from slimtune.kernels.dropout import draw_seed, dropped, kept, masked_
from slimtune.kernels.gain import is_kept
from slimtune.kernels.recipe import itself, recipe_of


class _LowRank(torch.autograd.Function):
    """forward(y_or_weight, ...): with `weight` the base product is part of the function, without it y is added to in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor,
        scale: float, p: float, seed: int, make: Any, *made_of: Tensor,
    ) -> Tensor:  # fmt: skip
        if y is None:
            assert weight is not None
            y = F.linear(x, weight, bias)
        else:
            ctx.mark_dirty(y)
        a, b = A.to(y.dtype), B.to(y.dtype)
        xc = x if x.dtype == y.dtype else x.to(y.dtype)
        if p:
            xc, keep = dropped(xc, p, seed)
            scale *= keep  # 1 / (1 - p) is part of the scale everywhere: x itself is not multiplied
        h = F.linear(xc, a)  # [n, a] @ [a, r] -> [n, r]
        _accumulate(y, h, b, scale)  # y += s h B^T
        keep_x = (x,) if make is itself else made_of  # x with its own past, for second derivatives
        ctx.save_for_backward(h, A, B, weight, *(keep_x if ctx.needs_input_grad[4] else ()))
        ctx.scale, ctx.p, ctx.seed, ctx.make, ctx.shape, ctx.x_dtype = scale, p, seed, make, x.shape, x.dtype
        ctx.inputs = len(made_of)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable(ctx, g)
        h, A, B, weight, *made_of = ctx.saved_tensors
        need_x, need_y, _, _, need_A, need_B = ctx.needs_input_grad[:6]
        b = B.to(g.dtype)
        flat = g.reshape(-1, g.shape[-1])
        dh = torch.mm(flat, b).mul_(ctx.scale)  # s g B -> [n, r]
        mask = kept(ctx.shape, ctx.p, ctx.seed, g.device, g.dtype)[0] if ctx.p else None
        dA = dB = dx = None
        if need_B:
            dB = torch.mm(flat.t(), h.reshape(-1, h.shape[-1])).to(B.dtype).mul_(ctx.scale)  # [b, n] @ [n, r]
        if need_A:
            x = ctx.make(*made_of)
            x = x if x.dtype == g.dtype else x.to(g.dtype)
            if ctx.p:
                x, _ = dropped(x, ctx.p, ctx.seed)
            dA = torch.mm(dh.t(), x.reshape(-1, x.shape[-1])).to(A.dtype)  # [r, n] @ [n, a]
        if need_x:
            a = A.to(g.dtype)
            if mask is None:
                dx = torch.mm(flat, weight).addmm_(dh, a) if weight is not None else torch.mm(dh, a)
            else:
                dx = masked_(torch.mm(dh, a), mask.view(-1, mask.shape[-1]))
                if weight is not None:
                    dx.addmm_(flat, weight)
            dx = dx.view(ctx.shape).to(ctx.x_dtype)
        return (dx, g if need_y else None, None, None, dA, dB, None, None, None, None, *[None] * ctx.inputs)


def _differentiable(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """As `backward`, but what it returns can be differentiated again.

    Raises:
        CapabilityError: x was not kept, or only what it is made of.
    """
    h, A, B, weight, *kept_x = ctx.saved_tensors
    need_x, need_y, _, _, need_A, need_B = ctx.needs_input_grad[:6]
    if (need_A and ctx.make is not itself) or (need_B and need_x and not need_A):
        raise CapabilityError(
            "a second derivative through this low-rank product needs its input, which was not kept",
            where="create_graph=True",
            hint="train A as well (freeze='none'), and leave st.lean out" if ctx.make is itself else "leave st.lean out",
        )
    a, b = A.to(g.dtype), B.to(g.dtype)
    mask: Tensor | float = 1.0
    if ctx.p:
        mask = kept(ctx.shape, ctx.p, ctx.seed, g.device, g.dtype)[0].ne(0).to(g.dtype)
    dh = ctx.scale * (g @ b)  # [..., r]
    dA = dB = dx = None
    if need_A:
        x = kept_x[0].to(g.dtype) * mask
        h = F.linear(x, a)
        dA = (dh.reshape(-1, dh.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(A.dtype)
    if need_B:
        dB = (ctx.scale * g.reshape(-1, g.shape[-1]).T @ h.reshape(-1, h.shape[-1])).to(B.dtype)
    if need_x:
        dx = (dh @ a) * mask
        dx = (dx if weight is None else dx + g @ weight).view(ctx.shape).to(ctx.x_dtype)
    return (dx, g if need_y else None, None, None, dA, dB, None, None, None, None, *[None] * ctx.inputs)


FEW = 16  # rows; below it, as when text is written token by token, what a product costs is its call, not its FLOPs


def _accumulate(y: Tensor, h: Tensor, b: Tensor, scale: float) -> None:
    if h.numel() <= FEW * h.shape[-1]:
        y.add_(F.linear(h, b), alpha=scale)
    else:
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), b.t(), alpha=scale)


def _without_gradient(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return y with s x A^T B^T added in place. Few rows are multiplied in the type of the masters: casting x is cheaper than casting A and B."""
    if x.numel() <= FEW * x.shape[-1] and A.dtype == B.dtype == torch.promote_types(A.dtype, x.dtype):  # activations are never cast down
        if x.numel() == x.shape[-1]:  # one row: a product with a vector is called faster
            d = torch.mv(B, torch.mv(A, x.reshape(-1).to(A.dtype)))  # [b, r] @ ([r, a] @ [a])
            y.view(-1).add_(d, alpha=scale)
            return y
        return y.add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=scale)
    a, b = A.to(y.dtype), B.to(y.dtype)
    _accumulate(y, F.linear(x.to(y.dtype), a), b, scale)
    return y


def fusing(t: Tensor) -> bool:
    """Tell whether hand-written functions may be used now.

    Not where the compiler fuses, under autocast, on shapes alone, and not where torch looks into what is called: under torch.func (whichever of
    the tensors it has wrapped), while a graph is traced, and under forward-mode differentiation.
    """
    if torch.compiler.is_compiling() or t.is_meta or torch.is_autocast_enabled(t.device.type):
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:  # type: ignore[attr-defined]
        return False
    return forward_ad._current_level < 0  # type: ignore[attr-defined]


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Return y + scale * drop(x) A^T B^T, accumulated into y where that is safe.

    Args:
        y: [..., b], fresh: nobody else reads it.
        x: [..., a].
        A, B: [r, a], [b, r], in any float type.
        scale: s.
        p: probability of dropping an element of x.
    """
    if y._is_view() or not y.is_contiguous() or (y.is_leaf and y.requires_grad) or is_kept(y):
        y = y.clone(memory_format=torch.contiguous_format)
    if p == 0 and not torch.is_grad_enabled():
        return _without_gradient(y, x, A, B, scale)
    recipe = recipe_of(x)
    return _LowRank.apply(x, y, None, None, A, B, scale, p, draw_seed(x, A) if p else 0, recipe.make, *recipe.inputs)


def linear_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Return x W^T + bias + scale * drop(x) A^T B^T with W frozen.

    Args:
        x: [..., a].
        weight, bias: [b, a] and [b] or None, of x's type; they get no gradient.
        A, B, scale, p: as in `add_low_rank`.
    """
    if p == 0 and not torch.is_grad_enabled():
        return _without_gradient(F.linear(x, weight, bias), x, A, B, scale)
    recipe = recipe_of(x)
    return _LowRank.apply(x, None, weight, bias, A, B, scale, p, draw_seed(x, A) if p else 0, recipe.make, *recipe.inputs)
