"""Shared tensors: one frozen matrix for all ops of an adapter, made where it is needed: from a seed, or from what a file held.

It is no buffer of any op, so moving the model does not copy it once per op; each device and dtype in use has one copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SharedMatrix:
    """Base: a matrix that `source` makes on the CPU, and its copies.

    Args:
        shape: rows, columns.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def source(self) -> Tensor:
        raise NotImplementedError

    def at(self, like: Tensor) -> Tensor:
        """Return the matrix on the device and in the type of `like`; ops ask once while they are built, as compiled code cannot draw it."""
        key = (like.device, like.dtype)
        if key not in self._made:
            self._made[key] = self.source().to(device=like.device, dtype=like.dtype)
        return self._made[key]


class RandomMatrix(SharedMatrix):
    """A matrix drawn from a seed, uniform by Kaiming (gain sqrt(2): bound sqrt(6 / columns)).

    Args:
        shape: rows, columns.
        seed: of a generator of its own, so that nothing else that draws numbers changes it.
        after: a matrix that the same generator draws first.
    """

    def __init__(self, shape: tuple[int, int], seed: int, after: RandomMatrix | None = None) -> None:
        super().__init__(shape)
        self.seed, self.after = seed, after

    def source(self) -> Tensor:
        return self._draw(torch.Generator().manual_seed(self.seed))

    def _draw(self, generator: torch.Generator) -> Tensor:
        if self.after is not None:
            self.after._draw(generator)
        bound = math.sqrt(6.0 / self.shape[1])
        return torch.empty(self.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


class HeldMatrix(SharedMatrix):
    """A matrix that a file held.

    Attributes:
        value: None until it is filled.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        self.value: Tensor | None = None

    def fill(self, value: Tensor) -> None:
        """Take over the value; the first of all the ops that share it does."""
        if self.value is None:
            self.value = value.clone()

    def source(self) -> Tensor:
        assert self.value is not None, "filled while its file is read"
        return self.value
