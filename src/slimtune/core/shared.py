"""Shared tensors: one random, frozen matrix for all ops of an adapter, kept as a seed and made where it is needed.

It is no buffer of any op, so moving the model does not copy it once per op; each device and dtype in use has one copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RandomMatrix:
    """A matrix drawn from a seed, uniform by Kaiming (a = sqrt(5)), or a slice of it.

    Args:
        shape: rows, columns.
        seed: of a generator of its own, so that nothing else that draws numbers changes it.
    """

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        self.shape, self.seed = shape, seed
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, like: Tensor) -> Tensor:
        """Return the matrix on the device and in the type of `like`; ops ask once while they are built, as compiled code cannot draw it."""
        key = (like.device, like.dtype)
        if key not in self._made:
            bound = 1.0 / math.sqrt(self.shape[1])
            drawn = torch.empty(self.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(self.seed))
            self._made[key] = drawn.to(device=like.device, dtype=like.dtype)
        return self._made[key]
