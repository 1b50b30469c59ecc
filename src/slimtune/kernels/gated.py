"""Gated activation f(gate) * up that keeps only gate and up (SwiGLU, GeGLU: arXiv 2002.05202).

Autograd keeps f(gate) and the product as well; here both are made again in backward, and the product is marked, so that the
low-rank kernel of the following projection does not keep it either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimtune.kernels.recipe import Last, mark

Activation = Callable[[Tensor], Tensor]
_LAST = Last()


def _active(gate: Tensor, f: Activation) -> tuple[Tensor, Tensor]:
    """Return (a leaf equal to gate, f of it with the way back): what the following projection's backward makes, this one's needs next."""

    def make() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            return leaf, f(leaf)

    found: tuple[Tensor, Tensor] = _LAST.of((gate,), f, make)
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, f: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.f = f
        return f(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        leaf, act = _active(gate, ctx.f)
        _LAST.let_go()
        d_up = g * act.detach()
        (d_gate,) = torch.autograd.grad(act, leaf, g * up)
        return d_gate, d_up, None


class _Make:
    """Makes f(gate) * up again."""

    def __init__(self, f: Activation) -> None:
        self.f = f

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return _active(gate, self.f)[1].detach() * up


def gated(gate: Tensor, up: Tensor, f: Activation) -> Tensor:
    """Return f(gate) * up for gate, up [..., m] and an elementwise f without parameters."""
    return mark(_Gated.apply(gate, up, f), _Make(f), gate, up)
