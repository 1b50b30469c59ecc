"""The layout of every method the reference library does not have: the same two files, a type name of ours, keys `<path>.<method>_<tensor>`.

A method registered by anybody is saved and loaded by this without code of its own: all its tensors and settings are in the file, and its
spec in the header.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtune.core.errors import FormatError
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import Layout, Place, Taker
from slimtune.files.layouts.reference import about_model


class Generic(Layout):
    """One for all; its type name is made from the method's."""

    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        return {"peft_type": type_name(adapter.spec.method), "inference_mode": True, "spec": adapter.spec.to_dict(), **about_model(model)}

    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        raise FormatError(
            f"{file.path.name} has lost the metadata in its header, without which a file of type {config['peft_type']} cannot be read",
            where=str(file.path),
            hint="some program rewrote it: fetch or save it again",
        )


def type_name(method: str) -> str:
    """Return the `peft_type` of a method of ours."""
    return f"SLIMTUNE_{method.upper()}"
