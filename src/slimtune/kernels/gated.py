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

from slimtune.kernels.recipe import mark

Activation = Callable[[Tensor], Tensor]


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
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            act = ctx.f(leaf)
        d_up = g * act.detach()
        (d_gate,) = torch.autograd.grad(act, leaf, g * up)
        return d_gate, d_up, None


class _Make:
    """Makes f(gate) * up again."""

    def __init__(self, f: Activation) -> None:
        self.f = f

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.f(gate) * up


def gated(gate: Tensor, up: Tensor, f: Activation) -> Tensor:
    """Return f(gate) * up for gate, up [..., m] and an elementwise f without parameters."""
    return mark(_Gated.apply(gate, up, f), _Make(f), gate, up)
