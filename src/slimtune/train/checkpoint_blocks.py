"""Activation checkpointing of a recipe's `memory:` line: which blocks keep their input only and run again in backward."""

from __future__ import annotations

from typing import Any

EVERY = {"fast": 0, "balanced": 2, "least": 1}  # every how many blocks one runs again; 0: none


def checkpoint_blocks(model: Any, every: int) -> None:
    """Make every `every`-th block keep its input only and run again in backward: less memory, more time; 0 is none."""
    if not every:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [m for m in model.modules() if "gradient_checkpointing" in m.__dict__ and type(m).__name__.endswith(("Layer", "Block"))]
    for i, block in enumerate(blocks):
        block.gradient_checkpointing = i % every == 0
