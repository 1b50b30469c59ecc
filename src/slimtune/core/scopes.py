"""Open `with` blocks: which of them holds where code runs now.

A context variable says it for threads and tasks. Generators share the context of whoever takes the next value, so a block that a generator
opened stays visible while another one runs, and may be closed in another thread: such a block belongs to the generator's own frame, and the
plan in force is that of the innermost frame on the stack that holds one, or of a block opened inside of it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType, MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimtune.core.plan import Plan

_GENERATES = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Block:
    """One open block.

    Attributes:
        plan: what acts inside.
        before: what the context said when it was opened.
        inside: the block of the generator in which it was opened.
        open: whether it still is.
    """

    __slots__ = ("before", "inside", "open", "plan")

    def __init__(self, plan: Plan, before: Block | None, inside: Block | None) -> None:
        self.plan, self.before, self.inside, self.open = plan, before, inside, True


def last_open(block: Block | None) -> Block | None:
    """Return a block, or the one before it that is still open."""
    while block is not None and not block.open:
        block = block.before
    return block


def opener(depth: int) -> FrameType | None:
    """Return the frame of the caller that opens a block, if it is a generator's: others open and close in one context."""
    frame = sys._getframe(depth + 1)
    return frame if frame.f_code.co_flags & _GENERATES else None


class Held:
    """The blocks that generators hold open, by their frames."""

    def __init__(self) -> None:
        self.blocks: dict[FrameType, list[Block]] = {}

    def __bool__(self) -> bool:
        return bool(self.blocks)

    def add(self, frame: FrameType, block: Block) -> None:
        self.blocks.setdefault(frame, []).append(block)

    def drop(self, frame: FrameType, block: Block) -> None:
        left = [b for b in self.blocks.pop(frame, []) if b is not block]
        if left:
            self.blocks[frame] = left

    def on_stack(self) -> Block | None:
        """Return the block of the innermost generator that runs now and holds one."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame not in self.blocks:
            frame = frame.f_back
        return self.blocks[frame][-1] if frame is not None else None

    def in_force(self, block: Block | None) -> Block | None:
        """Return the block that holds for the code that asks.

        Args:
            block: the one that the context says.
        """
        own, within = self.on_stack(), block
        if own is None:
            return block
        while within is not None and within is not own:
            within = within.inside
        return own if within is None else block


class RemembersBlock:
    """A method of a model that goes by the block in which it was looked up where it is called in a thread that has none of its own.

    `Thread(target=model.generate)` inside a block is how transformers streams tokens.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self.function
        method, state = MethodType(self.function, model), model.slim_state
        block = state.block()
        if block is None:
            return method

        @functools.wraps(method)
        def planned(*args: Any, **kwargs: Any) -> Any:
            if state.in_block():
                return method(*args, **kwargs)
            leave = state.enter(block.plan)
            try:
                return method(*args, **kwargs)
            finally:
                leave()

        return planned
