"""AdaLoRA in the reference's layout.

    linear, Conv1D     X.lora_A [q, a]         X.lora_E [q, 1]   X.lora_B [b, q]
    2-D convolution    X.lora_A [q, a * k]     X.lora_E [q, 1]   X.lora_B [b, q]
    config             rank_pattern: X.lora_E -> init_r flags, q of them true (null: nothing was pruned yet, q = init_r)

The delta is lora_alpha / (init_r + 1e-5) B (A * E), pruned or not. Scores and moments of training are in no file.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import FormatError, MismatchError
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import Codec, Place, Taker, dotted
from slimtune.files.layouts.config import NUMBER, RANK, SHARE, Check, Fields, biases, is_number, targets
from slimtune.files.layouts.lora_config import DEFAULTS
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.reading import kind_known, where_to

COUNT: Check = ("a number from 0", lambda v: type(v) is int and 0 <= v < 2**40)
MEMORY: Check = ("a number between 0 and 1", lambda v: is_number(v) and 0 < v < 1)


def _flags(v: Any) -> bool:
    lists = list(v.values()) if isinstance(v, dict) and all(isinstance(k, str) for k in v) else None
    return lists is not None and all(isinstance(f, list) and 0 < len(f) < 2**24 and set(map(type, f)) == {bool} for f in lists)


class AdaLoRACodec(Codec):
    """A, E and B; kernels of a convolution are flat in the file."""

    def put(self, place: Place, op: Op, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        return {self.name(place, n): t if n == "E" else t.flatten(1) for n, t in op.export(module).items()}

    def take(self, place: Place, op: Op, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name, shape in op.expects(module).items():
            t = file.take(self.name(place, name))
            fits = t is not None and t.dim() == 2 and t.shape[0] == shape[0] and t.numel() == torch.Size(shape).numel()
            found[name] = t.reshape(shape) if fits and t is not None else t
        return found

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, f"lora_{tensor}")


class AdaLoRALayout(ModularLayout):
    """peft_type ADALORA."""

    peft_type = "ADALORA"
    methods = ("adalora",)
    kinds = ("linear", "conv")
    key = re.compile(r"(?P<path>.*?)\.?(?P<tensor>lora_A|lora_B|lora_E)")
    fields = Fields(
        {
            **DEFAULTS, "rank_pattern": None, "target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
            "orth_reg_weight": 0.5, "total_step": None,
        },
        # of a LoRA's fields the reference's AdaLoRA does not look at these
        free=frozenset({"alpha_pattern", "eva_config", "fan_in_fan_out", "init_lora_weights", "loftq_config", "megatron_core",
                        "qalora_group_size", "r", "use_rslora"}),
        types={
            **targets(), "bias": biases("lora_only"), "lora_alpha": NUMBER, "lora_dropout": SHARE, "target_r": RANK, "init_r": RANK,
            "tinit": COUNT, "tfinal": COUNT, "deltaT": RANK, "beta1": MEMORY, "beta2": MEMORY, "orth_reg_weight": NUMBER,
            "total_step": ("a number of steps or nothing", lambda v: v is None or (type(v) is int and 0 < v < 2**40)),
            "rank_pattern": ("a mapping name -> flags", lambda v: v is None or _flags(v)),
        },
    )  # fmt: skip

    @property
    def own_biases(self) -> str:
        return "lora_only"

    def op_codec(self, method: str) -> Codec:
        return AdaLoRACodec()

    # ---- writing ------------------------------------------------------------------------------------------------
    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        return super().problem(adapter, model) or next(
            (p for path, op in self.own(adapter).items() if (p := _unknown_there(op.kind, model.get_submodule(path)))), ""
        )

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        found: list[Any] = list(ops.values())
        return "" if len({(op.full, op.scale) for op in found}) == 1 else "its sites began with different ranks or scales"

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        from slimtune.methods.adalora import EPSILON

        spec: Any = next(p for p in adapter.spec.parts() if p.method == "adalora")
        first: Any = next(iter(ops.values()))
        total = spec.total_steps or adapter.total_steps
        starts, ends = spec.times(total) if total else (0, 0)
        rows = {f"{path}.lora_E": op.rows() for path, op in ops.items()}  # type: ignore[operator]
        alpha = first.scale * (first.full + EPSILON)
        near = next((float(round(alpha, d)) for d in (0, 2, 4, 8) if round(alpha, d) / (first.full + EPSILON) == first.scale), alpha)
        return {
            "init_r": first.full,
            "target_r": spec.target_r,
            "lora_alpha": int(near) if near == int(near) else near,
            "lora_dropout": spec.dropout,
            "tinit": starts,
            "tfinal": ends,
            "deltaT": spec.delta_t,
            "beta1": spec.beta1,
            "beta2": spec.beta2,
            "orth_reg_weight": spec.orthogonality,
            "total_step": total or 1,  # the reference takes no config without
            "rank_pattern": None if all(all(r) for r in rows.values()) else rows,
        }

    # ---- reading ------------------------------------------------------------------------------------------------
    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        from slimtune.methods.adalora import AdaLoRA

        total = config["total_step"]
        timed = total is not None and config["tinit"] + config["tfinal"] < total
        return AdaLoRA(
            init_r=config["init_r"],
            target_r=min(config["target_r"], config["init_r"]),
            alpha=float(config["lora_alpha"]) if config["lora_alpha"] > 0 else float(config["init_r"]),
            dropout=float(config["lora_dropout"]),
            t_init=config["tinit"],
            t_final=config["tfinal"],
            delta_t=config["deltaT"],
            beta1=float(config["beta1"]),
            beta2=float(config["beta2"]),
            orthogonality=float(config["orth_reg_weight"]),
            total_steps=total if timed else None,
            **where_to(config),
        )

    def settings(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any], spec: Spec) -> dict[str, Any]:
        from slimtune.methods.adalora import EPSILON, bits

        if problem := _unknown_there(kind_known(module), module):
            raise FormatError(f"the file adapts a module on which its delta means something else here: {problem}", where=place.path)
        key = f"{place.path}.lora_E"
        flags = (config["rank_pattern"] or {}).get(key)
        if flags is None:
            flags = [True] * config["init_r"]
        held = taker.shape(key)[0] if key in taker and taker.shape(key) else None
        if held is not None and held != sum(flags):
            raise MismatchError(
                f"{key} has rank {held}, the config says {sum(flags)}", where=str(taker.file.path), hint="the two files do not belong together"
            )
        alpha = config["lora_alpha"]
        return {
            "scale": float(alpha if alpha > 0 else sum(flags)) / (config["init_r"] + EPSILON),
            "rows": bits(flags),
            "chosen": None,
        }


def _unknown_there(kind: Kind, module: Any) -> str:
    """Return why the reference has no AdaLoRA for a module, or ""."""
    if kind.name == "linear":
        return ""
    if kind.name == "conv" and len(module.kernel_size) == 2 and module.groups == 1 and module.padding_mode == "zeros":
        return ""
    return f"the reference has no AdaLoRA for such a {type(module).__name__}"
