"""Tools of methods whose ops change shape or keep more than parameters while they train (see `core.stepping`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from slimtune.core.kind import Kind


def set_values(p: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape; the object stays, so optimisers and lists that hold it need not know."""
    p.grad = None
    other = torch.float32 if p.dtype == torch.float64 else torch.float64
    fresh = torch.empty_like(values, dtype=p.dtype, device=p.device, memory_format=torch.contiguous_format)
    p.data = torch.empty(0, dtype=other, device=p.device)  # a change of type in between makes autograd forget the old shape
    p.data = fresh
    with torch.no_grad():
        p.copy_(values)  # also moves the version, which stacked copies are checked by


def stacks(kind: Kind, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors in the shapes of a low-rank pair as those of its matrices: A [G, q, k], B [G, m, q]."""
    if kind.rank_axis == 1:
        return A, B
    G = max(A.shape[0], 1) // max(B.shape[1], 1)  # groups of a convolution
    return A.reshape(G, A.shape[0] // G, math.prod(A.shape[1:])), B.reshape(G, B.shape[0] // G, B.shape[1])


class Trained:
    """Mixin of ops with more to a checkpoint than parameters and buffers of fixed shapes.

    Attributes:
        memory: what the method keeps between steps, by name; never in an adapter's file.
    """

    memory: dict[str, Tensor]

    def training_state(self: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that training goes on from, to the bit: tensors, and facts as JSON values."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return tensors | {f"memory.{name}": t for name, t in self.memory.items()}, self.facts()

    def restore_training(self: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over what `training_state` gave, shapes included.

        Raises:
            KeyError, ValueError: it is that of another kind of op.
        """
        like = next(self.parameters())
        self.memory = {}
        for name in self._buffers:
            self._buffers[name] = None
        for name, value in tensors.items():
            if name.startswith("memory."):
                self.memory[name.removeprefix("memory.")] = value.to(like.device)
            elif name in self._parameters:
                set_values(self._parameters[name], value)
            elif name in self._buffers:
                self._buffers[name] = value.to(like.device)
            else:
                raise KeyError(name)
        self.take_facts(facts)

    def facts(self) -> dict[str, Any]:
        """Return what else `restore_training` needs."""
        return {}

    def take_facts(self, facts: dict[str, Any]) -> None:
        """Take over what `facts` gave."""
