"""Recipes: how to make a tensor again from others that are kept anyway.

A lean norm or gated activation marks its output with a recipe; a kernel that would save that output for backward saves the recipe's
inputs instead, which the norm's or the activation's own backward keeps already, and makes the output again when it is needed. A mark lives on
the Python tensor object; where it gets lost on the way, the kernel saves the tensor itself, so nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    return found if isinstance(found, Recipe) else Recipe(_itself, (t.detach(),))


def _itself(t: Tensor) -> Tensor:
    return t
