"""Fully trained modules and biases inside a reference file: `modules_to_save` and `bias`, both the full value under the base's own name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimtune.core.kind import Kind
from slimtune.files.layouts.base import Codec, Place, Taker, dotted


class FullCodec(Codec):
    """A `DenseOp`: `<path>.weight`, `<path>.bias`; the op itself turns full values into deltas and back."""

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, tensor)


class BiasCodec(Codec):
    """A `BitFitOp`: the full bias; the reference keeps it one level deeper where a LoRA sits on the same module."""

    def __init__(self, wrapped: set[str]) -> None:
        self.wrapped = wrapped  # paths that carry a LoRA

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        base = kind.bias(module, place.param)
        return {self._deep(place): op.d if base is None else base.to(op.d.dtype) + op.d}

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        full, base = file.take(self.name(place, "bias")), kind.bias(module, place.param)
        if full is None or base is None or base.shape != full.shape:
            return {"d": full}
        return {"d": full.to(op.d.dtype) - base.detach().cpu().to(op.d.dtype)}

    def _deep(self, place: Place) -> str:
        below = "base_layer" if place.path in self.wrapped else ""
        return dotted(place.path, below, *(["out_proj", below] if place.param == "out_proj" else []), "bias")

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, "out_proj" if place.param == "out_proj" else "", tensor)
