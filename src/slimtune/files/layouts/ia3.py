"""IA3 in the reference's layout: X.ia3_l.

    linear, Conv1D   [b, 1] on the output, [1, a] on the input of a module named in `feedforward_modules`
    convolution      [1, b, 1, ...], [1, a, 1, ...]

An entry of `feedforward_modules` fits every path that ends with it, letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from slimtune.core.errors import MismatchError
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import Codec, Place, Taker, dotted
from slimtune.files.layouts.config import Fields, is_regex, is_texts, targets
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.reading import where_to
from slimtune.methods.ia3 import ScaleInput


class IA3Codec(Codec):
    """One vector l."""

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        return {self.name(place, "l"): op.l.detach().view(self._shape(op, kind))}

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        l = file.take(self.name(place, "l"))
        if l is None or tuple(l.shape) == self._shape(op, kind):
            return {"l": None if l is None else l.flatten()}
        raise MismatchError(
            f"{self.name(place, 'l')} is {list(l.shape)} in the file, {list(self._shape(op, kind))} here",
            where=str(file.file.path),
            hint="is it the right base, and does `feedforward_modules` belong to this file?",
        )

    def _shape(self, op: Any, kind: Kind) -> tuple[int, ...]:
        n = op.l.numel()
        if kind.name == "conv":
            return (1, n, *[1] * (len(op.shape) - 2))
        return (1, n) if isinstance(op, ScaleInput) else (n, 1)

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, "ia3_l")


class IA3Layout(ModularLayout):
    """peft_type IA3."""

    peft_type = "IA3"
    methods = ("ia3",)
    kinds = ("linear", "conv")
    key = re.compile(r"(?P<path>.*?)\.?(?P<tensor>ia3_l)")
    fields = Fields(
        {
            "exclude_modules": None, "fan_in_fan_out": False, "feedforward_modules": None, "init_ia3_weights": True, "modules_to_save": None,
            "target_modules": None,
        },
        free=frozenset({"fan_in_fan_out", "init_ia3_weights"}),
        types={
            **targets("layers_to_transform", "layers_pattern"),
            "feedforward_modules": ("a list of names or a regex", lambda v: v is None or is_regex(v) or is_texts(v)),
        },
    )  # fmt: skip

    def op_codec(self, method: str) -> Codec:
        return IA3Codec()

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        odd = [op.kind.name for op in ops.values() if op.kind.name not in self.kinds]
        return f"the reference has no IA3 of a {odd[0]}" if odd else ""

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        inner = {path for path, op in ops.items() if isinstance(op, ScaleInput)}
        return {"feedforward_modules": _feedforward(inner, set(ops), self.where(set(ops), list(base_modules(model)))["target_modules"])}

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        from slimtune.methods.ia3 import IA3

        named = config["feedforward_modules"] or []
        inner = (f"re:{named}",) if isinstance(named, str) else tuple(rf"re:.*{re.escape(end)}" for end in named)
        return IA3(feedforward=inner, **where_to(config))


def _feedforward(inner: Collection[str], all_paths: Collection[str], written: Any) -> list[str] | str:
    """Return `feedforward_modules` for the `inner` ones: entries of the targets if these say it exactly, else a regex."""
    ends = sorted(t for t in written if any(p.endswith(t) for p in inner)) if isinstance(written, list) else []
    if {p for p in all_paths if p.endswith(tuple(ends))} == set(inner):
        return ends
    return "|".join(re.escape(p) for p in sorted(inner))
