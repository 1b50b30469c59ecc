"""Which layout an adapter is written in, and which one reads a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from slimtune.core.errors import FormatError
from slimtune.core.state import Adapter
from slimtune.files.layouts.adalora import AdaLoRALayout
from slimtune.files.layouts.base import Layout
from slimtune.files.layouts.generic import Generic
from slimtune.files.layouts.ia3 import IA3Layout
from slimtune.files.layouts.ln_tuning import LayerNormLayout
from slimtune.files.layouts.lora import LoRALayout
from slimtune.files.layouts.prefix import PrefixLayout
from slimtune.files.layouts.prompt import MultitaskLayout, PromptTuningLayout, PTuningLayout
from slimtune.files.layouts.trainable_tokens import TokensLayout
from slimtune.files.layouts.vera import VeRALayout

# A method of the reference library adds its class here.
LAYOUTS: list[type[Layout]] = [
    LoRALayout,
    AdaLoRALayout,
    VeRALayout,
    IA3Layout,
    LayerNormLayout,
    TokensLayout,
    PrefixLayout,
    PromptTuningLayout,
    PTuningLayout,
    MultitaskLayout,
]


def layout_for(adapter: Adapter, model: nn.Module) -> Layout:
    """Return the layout to write an adapter in: the reference's where it can hold it, else the generic one."""
    methods = {part.method for part in adapter.spec.parts()}
    for cls in LAYOUTS:
        if methods & set(cls.methods):
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
