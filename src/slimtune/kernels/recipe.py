"""Recipes: how to make a tensor again from others that are kept anyway.

A lean norm or gated activation marks its output with a recipe; a kernel that would save that output for backward saves the recipe's
inputs instead, which the norm's or the activation's own backward keeps already, and makes the output again when it is needed. A mark lives on
the Python tensor object; where it gets lost on the way, the kernel saves the tensor itself, so nothing depends on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """Make a tensor by `make(*inputs)`; `inputs` are detached."""

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def mark(t: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Mark `t` as remakeable, and return it."""
    t.slim_recipe = Recipe(make, tuple(i.detach() for i in inputs))  # type: ignore[attr-defined]
    return t


def recipe_of(t: Tensor) -> Recipe:
    """Return the recipe of a tensor; without a mark, the tensor itself."""
    found = t.__dict__.get("slim_recipe")
    return found if isinstance(found, Recipe) else Recipe(itself, (t.detach(),))


def itself(t: Tensor) -> Tensor:
    """Make a tensor out of itself: what stands for a recipe where there is none."""
    return t


class Last:
    """What was made last on this thread: several backward passes that follow one another ask for the same thing, and it is made once."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of(self, inputs: tuple[Tensor, ...], how: object, make: Callable[[], Any]) -> Any:
        """Return what `make()` gives; if the last call had the very same inputs, unchanged since, and an equal `how`: what it gave then."""
        key = (how, *((t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) for t in inputs))
        last = getattr(self._local, "entry", None)
        if last is None or last[0] != key:
            # The inputs are held as well: while they live, nothing else can stand where they stand.
            last = self._local.entry = (key, make(), inputs)
        return last[1]

    def let_go(self) -> None:
        """Keep it no longer."""
        self._local.entry = None
