"""VeRA in the reference's layout.

    X.vera_lambda_d [r]   X.vera_lambda_b [b]
    base_model.vera_A [r, a]   base_model.vera_B [b, r], a and b the largest of all adapted layers: only if `save_projection`

Without them the matrices are drawn from `projection_prng_key`; `methods.vera` draws the same ones, so ours are never written. A file that holds
other matrices than its key gives keeps them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from slimtune.core.errors import FormatError
from slimtune.core.op import Op
from slimtune.core.shared import RandomMatrix
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import OUTSIDE, Codec, Place, Taker, dotted
from slimtune.files.layouts.config import FLAG, NUMBER, RANK, SHARE, Fields, biases, targets
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.reading import kind_known, where_to

_A, _B = f"{OUTSIDE}vera_A", f"{OUTSIDE}vera_B"


class VeRACodec(Codec):
    """d, l, and A and B where they are held."""

    def name(self, place: Place, tensor: str) -> str:
        return {"A": _A, "B": _B}.get(tensor) or dotted(place.path, "vera_lambda_d" if tensor == "d" else "vera_lambda_b")


class VeRALayout(ModularLayout):
    """peft_type VERA."""

    peft_type = "VERA"
    methods = ("vera",)
    key = re.compile(r"(?P<path>.*?)\.?(?P<tensor>vera_lambda_d|vera_lambda_b)")
    fields = Fields(
        {
            "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "layers_pattern": None, "layers_to_transform": None,
            "modules_to_save": None, "projection_prng_key": 0, "r": 256, "save_projection": True, "target_modules": None, "vera_dropout": 0.0,
        },
        free=frozenset({"fan_in_fan_out", "init_weights"}),
        types={
            **targets("exclude_modules"), "r": RANK, "d_initial": NUMBER, "vera_dropout": SHARE, "save_projection": FLAG, "bias": biases("vera_only"),
            "projection_prng_key": ("a number from 0", lambda v: type(v) is int and 0 <= v < 2**63),
        },
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Any] = {}  # settings of every op

    def op_codec(self, method: str) -> Codec:
        return VeRACodec()

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        found: list[Any] = list(ops.values())
        sizes = (max(op.a for op in found), max(op.b for op in found))
        same = {(op.shared_A.shape[1], op.shared_B.shape[0]) for op in found} == {sizes}
        return "" if same else "its matrices are larger than its layers"

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        spec: Any = next(p for p in adapter.spec.parts() if p.method == "vera")
        first: Any = next(iter(ops.values()))
        return {
            "r": spec.r,
            "d_initial": spec.d_start,
            "vera_dropout": spec.dropout,
            "projection_prng_key": spec.seed,
            "save_projection": not first.settings()["drawn"],
        }

    def places(self, taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any]) -> list[Place]:
        places = super().places(taker, modules, config)
        widths = [kind_known(modules[p.path]).widths(modules[p.path], p.param) for p in places]
        if not config["save_projection"]:
            self.made = {"a": max(w[0] for w in widths), "b": max(w[1] for w in widths), "drawn": True} if widths else {}
            return places
        absent = [name for name in (_A, _B) if name not in taker]
        if absent:
            raise FormatError(f"the file holds no {absent[0]}, which its config promises", where=str(taker.file.path), hint="fetch it again")
        A, B, r = taker.look(_A), taker.look(_B), config["r"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != r or B.shape[1] != r:
            raise FormatError(
                f"the shared matrices are {list(A.shape)} and {list(B.shape)}, not [{r}, a] and [b, {r}]",
                where=str(taker.file.path),
                hint="the two files do not belong together",
            )
        drawn_A = RandomMatrix((r, A.shape[1]), config["projection_prng_key"])
        drawn_B = RandomMatrix((B.shape[0], r), config["projection_prng_key"], after=drawn_A)
        drawn = torch.equal(A, drawn_A.source()) and torch.equal(B, drawn_B.source())
        if drawn:
            taker.take(_A), taker.take(_B)
        self.made = {"a": A.shape[1], "b": B.shape[0], "drawn": drawn}
        return places

    def settings(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any], spec: Spec) -> dict[str, Any]:
        return self.made

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        from slimtune.methods.vera import VeRA

        options = {"r": config["r"], "d_start": float(config["d_initial"]), "seed": config["projection_prng_key"]}
        return VeRA(**options, dropout=float(config["vera_dropout"]), **where_to(config))
