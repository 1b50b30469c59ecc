"""LoRA in the reference's layout, and what it counts as LoRA: with a magnitude (`DoRA`), with pooled inputs (`QALoRA`, only ever read).

Names and shapes of the tensors: `lora_codecs`. Beside them may stand trained tokens (X.token_adapter.trainable_tokens_delta: a union of a LoRA
and `TrainableTokens`), full modules and biases (see `full`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from slimtune.core.errors import FormatError, MismatchError
from slimtune.core.op import Op
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import Codec, Place, Taker
from slimtune.files.layouts.lora_codecs import CODECS, TWICE, LoRACodec
from slimtune.files.layouts.lora_config import FIELDS, check_lora
from slimtune.files.layouts.lora_reading import KEY, lora_places, spec_of
from slimtune.files.layouts.modular import ModularLayout, paths_of
from slimtune.files.layouts.patterns import to_pattern, to_targets
from slimtune.files.layouts.reading import kind_known, look_up
from slimtune.files.layouts.trainable_tokens import INSIDE, TokensCodec, named_tables, token_places, tokens_of, untied
from slimtune.methods.trainable_tokens import TrainableTokens
from slimtune.methods.union import Union

TOKENS = "trainable_tokens"


class LoRALayout(ModularLayout):
    """peft_type LORA."""

    peft_type = "LORA"
    methods = ("lora", "dora", "qa_lora")  # the last only ever read
    fields = FIELDS
    key = KEY
    kinds = ("linear", "conv", "embedding", "attention")
    besides = ("trainable_tokens",)

    def __init__(self) -> None:
        super().__init__()
        self.depth: dict[tuple[str, str], int] = {}
        self.twice = True

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        """Learn which ops share a module: nested names depend on it."""
        super().prepare(places, model)
        of_path: dict[str, set[str]] = {}
        for p in places:
            if p.method in self.methods:
                of_path.setdefault(p.path, set()).add(p.param)
        for path, params in of_path.items():
            order = [name for name in model.get_submodule(path)._parameters if name in params]
            self.depth.update({(path, name): i for i, name in enumerate(reversed(order))})

    def names(self, file: TensorFile) -> dict[str, str]:
        return {k.removesuffix(".weight") if k.endswith("lora_magnitude_vector.weight") else k: v for k, v in super().names(file).items()}

    def op_codec(self, method: str) -> Codec:
        if method == "trainable_tokens":
            return TokensCodec(INSIDE)
        return CODECS[method](self.depth, self.twice)

    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        tokens = paths_of(adapter).get("trainable_tokens", {})
        if any(path in self.own(adapter) for path in tokens):
            return "a table of tokens carries a LoRA, too"
        return super().problem(adapter, model) or untied(tokens, model)

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        if any(op.method == "qa_lora" for op in ops.values()):
            return "the reference pools inputs on GPTQ layers only"
        if any(key.endswith("_proj_weight") and key != "in_proj_weight" for path, key in adapter.ops):
            return "it adapts separate attention projections"
        if len({op.method for op in adapter.ops.values() if op.method in self.methods}) > 1:
            return "its LoRAs are of several kinds"
        magnitudes: list[Any] = [op for op in ops.values() if op.method == "dora"]
        if any(op.inner.method not in {"", "lora"} or not hasattr(op.inner, "up_bias") for op in magnitudes):
            return "it gives a magnitude to another method than LoRA"
        if any(op.kind.name == "conv" and op.inner.A.shape[0] != op.inner.B.shape[1] for op in magnitudes):
            return "the reference has no magnitude of a grouped convolution"
        return ""

    # ---- writing ------------------------------------------------------------------------------------------------
    def where(self, wanted: Any, paths: Any) -> dict[str, Any]:
        return {}  # experts are named apart: see `options`

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        modules = base_modules(model)
        all_ops: list[tuple[str, Any]] = [(path, op) for (path, _), op in adapter.ops.items() if op.method in self.methods]
        experts = [(path, op) for path, op in all_ops if op.kind.name == "experts"]
        plain = {path for path, op in all_ops if op.kind.name != "experts"}
        dora, spec = all_ops[0][1].method == "dora", lora_in(adapter.spec)
        loras = [(f"{path}.{op.param}" if op.kind.name == "experts" else path, op.inner if dora else op) for path, op in all_ops]
        ranks = {where: op.r * (2 if op.A0 is not None else 1) for where, op in loras}
        alphas = {where: _alpha(op.scale, ranks[where], spec.rank_stabilised) for where, op in loras}
        r, alpha = _usual(ranks), _usual(alphas)
        params = [f"{p}.{name}" for p, m in modules.items() for name in m._parameters]
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": to_pattern(ranks, r),
            "alpha_pattern": to_pattern(alphas, alpha),
            "use_rslora": spec.rank_stabilised,
            "use_dora": dora,
            "lora_dropout": spec.dropout,
            "lora_bias": any(op.up_bias is not None for _, op in loras),
            **(to_targets(plain, list(modules)) if plain else {"target_modules": []}),
            "trainable_token_indices": tokens_of(paths_of(adapter).get("trainable_tokens", {})) or None,
            "target_parameters": to_targets({f"{p}.{op.param}" for p, op in experts}, params)["target_modules"] if experts else None,
        }

    # ---- reading what the reference wrote -----------------------------------------------------------------------
    def check(self, config: dict[str, Any], file: TensorFile, relax: frozenset[str]) -> None:
        check_lora(config, file.path, relax)
        self.twice = _version(config["peft_version"]) <= TWICE

    def places(self, taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any]) -> list[Place]:
        tokens = named_tables(config["trainable_token_indices"], modules) if config["trainable_token_indices"] else {}
        places = lora_places(taker, modules, config)
        if config["use_qalora"]:
            places = [self._pooled(p, modules[p.path], taker, config) for p in places]
        return places + token_places(tokens, modules, taker, INSIDE)

    def _pooled(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any]) -> Place:
        """Return the place as one of a QA-LoRA where the file's factor has pooled inputs: on layers that are not GPTQ the flag did nothing."""
        kind, g = kind_known(module), config["qalora_group_size"]
        a = LoRACodec(self.depth).names(place, kind)[0] if kind.name == "linear" else ""
        shape = taker.shape(a) if a in taker else ()
        pooled = len(shape) == 2 and g > 1 and shape[1] * g == kind.widths(module, place.param)[0]
        return replace(place, method="qa_lora") if pooled else place

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        found = {p.path: kind_known(model.get_submodule(p.path)).name for p in places}
        if config["ensure_weight_tying"] and (config["modules_to_save"] or any(found[p.path] == "embedding" for p in places if p.method != TOKENS)):
            raise FormatError("the adapter uses what slimtune does not do: ensure_weight_tying=True of a table that it changes as a whole")
        tables: dict[tuple[int, ...], list[str]] = {}
        for p in places:
            if p.method == TOKENS:
                tables.setdefault(tuple(sorted(p.settings["tokens"])), []).append(p.path)
        pooled = {p.method == "qa_lora" for p in places if p.method != TOKENS}
        if len(pooled) > 1:
            raise FormatError("the adapter uses what slimtune does not do: use_qalora=True in some layers and not in others")
        spec = spec_of(config, pooled=pooled == {True})
        if not tables:
            return spec
        return Union(of=(spec, *(TrainableTokens(tokens=ids, targets=tuple(paths)) for ids, paths in tables.items())))

    def settings(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any], spec: Spec) -> dict[str, Any]:
        kind = kind_known(module)
        a, b, bias = LoRACodec(self.depth).names(place, kind)
        if a not in taker:
            raise MismatchError(f"{a} is missing", where=str(taker.file.path), hint="fetch the file again, or ask who made it")
        rows = taker.shape(a)[0] if taker.shape(a) else 0
        key = f"{place.path}.{place.param}" if kind.name == "experts" else place.path
        r = int(look_up(config["rank_pattern"], key, config["r"]))
        alpha = look_up(config["alpha_pattern"], key, config["lora_alpha"])
        held = rows // kind.shape(module, place.param)[0] if kind.name == "experts" else rows
        if held != r:
            raise MismatchError(
                f"{a} has rank {held}, the config says {r}", where=str(taker.file.path), hint="the two files do not belong together"
            )
        wide = False
        if kind.name == "conv" and b in taker and len(taker.shape(b)) and module.groups > 1:  # type: ignore[operator]
            A, B = taker.look(a), taker.look(b)
            wide = tuple(A.shape) == kind.layouts(module, place.param, r)[-1] and kind.adopt(A, B) is A
        scale = float(alpha) / (math.sqrt(r) if config["use_rslora"] else r)
        if place.method == "qa_lora":  # there the mean of a group is multiplied with the number of groups
            g = config["qalora_group_size"]
            return {"r": r, "scale": scale * (kind.widths(module, place.param)[0] // g), "group": g, "pool": "mean"}
        return {"r": r, "scale": scale, "frozen_start": False, "up_bias": bias in taker, "wide": wide}


def _version(text: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", str(text or "0"))[:3])


def lora_in(spec: Spec) -> Any:
    """Return the LoRA inside a recipe: itself, a part of it, or what a DoRA gives a magnitude."""
    found: Any = next(p for p in spec.parts() if p.method in LoRALayout.methods)
    return found.of if found.method == "dora" else found


def _alpha(scale: float, r: int, stabilised: bool) -> float:
    """Return the alpha that gives a scale, as the roundest number that does."""
    down = math.sqrt(r) if stabilised else r
    exact = scale * down
    near = [float(round(exact, digits)) for digits in (0, 2, 4, 8)]
    alpha = next((a for a in near if a / down == scale), exact)
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: dict[str, Any]) -> Any:
    """Return the most frequent value, the smaller one in a draw."""
    counts = Counter(values.values())
    return min(counts, key=lambda v: (-counts[v], v))


