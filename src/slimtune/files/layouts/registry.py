"""Which layout an adapter is written in, and which one reads a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from slimtune.core.errors import FormatError
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import Layout
from slimtune.files.layouts.generic import Generic
from slimtune.files.layouts.lora import LoRALayout

LAYOUTS: list[type[Layout]] = [LoRALayout]  # a method of the reference library adds its class here


def layout_for(adapter: Adapter, model: nn.Module) -> Layout:
    """Return the layout to write an adapter in: the reference's where it can hold it, else the generic one."""
    for cls in LAYOUTS:
        if adapter.spec.method in cls.methods:
            layout = cls()
            if not layout.problem(adapter, model):
                return layout
    return Generic()


def layout_of(peft_type: str, path: Path) -> Layout:
    """Return the layout of a file by its `peft_type`.

    Raises:
        FormatError: no such type is known.
    """
    for cls in LAYOUTS:
        if peft_type == cls.peft_type:
            return cls()
    if peft_type.startswith("SLIMTUNE_"):
        return Generic()
    raise FormatError(
        f"slimtune has no method for files of type {peft_type[:60]!r}",
        where=str(path),
        hint=f"it reads: {', '.join(cls.peft_type for cls in LAYOUTS)}, and its own SLIMTUNE_... types",
    )
