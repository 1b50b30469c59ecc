"""LayerNorm tuning in the reference's layout: X.ln_tuning_layers.weight and .bias, the whole new values.

The reference copies any module that its config names; a file with other modules than norms is refused, with the module's name.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import Codec, Place, dotted
from slimtune.files.layouts.config import Fields, targets
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.reading import where_to


class NormCodec(Codec):
    """A `DenseOp` under the reference's name."""

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, "ln_tuning_layers", tensor)


class LayerNormLayout(ModularLayout):
    """peft_type LN_TUNING."""

    peft_type = "LN_TUNING"
    methods = ("ln_tuning",)
    kinds = ("norm", "linear", "conv", "embedding")
    key = re.compile(r"(?P<path>.*?)\.?ln_tuning_layers\.(?P<tensor>weight|bias)")
    fields = Fields(
        {"exclude_modules": None, "modules_to_save": None, "target_modules": None},
        types=targets("layers_to_transform", "layers_pattern"),
    )

    def op_codec(self, method: str) -> Codec:
        return NormCodec()

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Any]) -> dict[str, Any]:
        return {}

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        from slimtune.methods.ln_tuning import LayerNormTuning

        return LayerNormTuning(**where_to(config))
