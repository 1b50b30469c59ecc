"""Fully trained modules and biases inside a reference file: `modules_to_save` and `bias`, both the full value under the base's own name."""

from __future__ import annotations

from torch import Tensor, nn

from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.files.layouts.base import Codec, Place, Taker, dotted


class FullCodec(Codec):
    """A `DenseOp`: `<path>.weight`, `<path>.bias`; the op itself turns full values into deltas and back."""

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, tensor)


class BiasCodec(Codec):
    """A `BitFitOp`: the full bias; the reference keeps it one level deeper where a LoRA sits on the same module."""

    def __init__(self, wrapped: set[str]) -> None:
        self.wrapped = wrapped  # paths that carry a LoRA

    def put(self, place: Place, op: Op, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        base = kind.bias(module, place.param)
        return {self.name(place, "bias"): op.d if base is None else base.to(op.d.dtype) + op.d}  # type: ignore[operator]

    def take(self, place: Place, op: Op, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        full, base = file.take(self.name(place, "bias")), kind.bias(module, place.param)
        return {"d": full if full is None or base is None or base.shape != full.shape else full.to(op.d.dtype) - base.detach().cpu().to(op.d.dtype)}  # type: ignore[arg-type, union-attr]

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, "base_layer" if place.path in self.wrapped else "", tensor)
