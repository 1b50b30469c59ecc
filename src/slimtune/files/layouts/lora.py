"""LoRA in the reference's layout.

    linear, Conv1D     X.lora_A.weight [r, a]             X.lora_B.weight [b, r]       X.lora_B.bias [b]
    convolution        X.lora_A.weight [r, a, *k]         X.lora_B.weight [b, r/g, 1..]
    embedding          X.lora_embedding_A [r, num]        X.lora_embedding_B [dim, r]
    MultiheadAttention X.lora_A/B.weight (in_proj)        X.base_layer.out_proj.lora_A/B.weight
                       (out_proj counts twice: see `TWICE`)
    experts            X.lora_A.weight [E r, a], rows expert by expert
                       X.lora_B.weight [b, r E], columns rank by rank; the last adapted parameter of a module stands at X, the one
                       before at X.base_layer, and so on
    full modules, biases: see `full`

A LoRA with a frozen start is written as a plain one of rank 2 r: [A; A0] and [B, -B0] with the same s.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import FormatError, MismatchError
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import PREFIX, Codec, Layout, Place, Taker, dotted
from slimtune.files.layouts.full import BiasCodec, FullCodec
from slimtune.files.layouts.lora_config import DEFAULTS, check_config
from slimtune.files.layouts.lora_reading import KEY, all_there, drop_base_copies, kind_known, look_up, lora_places, other_places, spec_of
from slimtune.files.layouts.patterns import (
    shortest,
    to_pattern,
    to_targets,
)  # fmt: skip
from slimtune.files.layouts.reference import HEADS, about_model

# Up to this version the reference adds the delta of an attention module's output projection twice (its pull request 3774), in training as well.
# So this is what its files mean; ours hold half of B there, to mean the same.
TWICE = (0, 21, 2)


class LoRACodec(Codec):
    """Names and shapes of one LoRA op."""

    def __init__(self, depth: dict[tuple[str, str], int], twice: bool = True) -> None:
        self.depth = depth  # (path, param) of experts -> how many levels below X it stands
        self.twice = twice  # whether out_proj of an attention module counts twice

    def names(self, place: Place, kind: Kind) -> tuple[str, str, str]:
        """Return the names of A, B and B's bias."""
        if kind.name == "embedding":
            return dotted(place.path, "lora_embedding_A"), dotted(place.path, "lora_embedding_B"), dotted(place.path, "lora_B.bias")
        below = ""
        if place.param == "out_proj":
            below = "base_layer.out_proj"
        elif kind.name == "attention" and place.param != "in_proj_weight":
            below = place.param  # the reference has no separate projections: a name of our own
        elif kind.name == "experts":
            below = ".".join(["base_layer"] * self.depth[place.path, place.param])
        at = dotted(place.path, below)
        return dotted(at, "lora_A.weight"), dotted(at, "lora_B.weight"), dotted(at, "lora_B.bias")

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        a, b, bias = self.names(place, kind)
        with torch.no_grad():
            A, B = op.factors()
            if kind.name == "experts":
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)  # [E, r, a] -> [E r, a];  [E, b, r] -> [b, r E]
            elif kind.name == "conv" and A.shape[1] != module.in_channels:
                A = kind.widen(A, module.groups)  # type: ignore[attr-defined]
            elif place.param == "out_proj" and self.twice:
                B = B / 2
        return {a: A, b: B} | ({} if op.up_bias is None else {bias: op.up_bias})

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        a, b, bias = self.names(place, kind)
        A, B = file.take(a), file.take(b)
        out: dict[str, Tensor | None] = {} if op.up_bias is None else {"up_bias": file.take(bias)}
        if A is None or B is None:
            return out | {"A": A, "B": B}
        if kind.name == "experts":
            E = op.shape[0]
            if A.dim() == B.dim() == 2 and A.shape[0] % E == B.shape[1] % E == 0:
                A, B = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
        elif kind.name == "conv" and A.dim() == B.dim() and A.shape[0] == B.shape[1] * module.groups:  # type: ignore[operator]
            A = kind.adopt(A, B)
        elif place.param == "out_proj" and self.twice:
            B = B * 2
        if op.A0 is None:
            return out | {"A": A, "B": B}
        return out | _split(A, B, experts=kind.name == "experts")


def _split(A: Tensor, B: Tensor, experts: bool) -> dict[str, Tensor | None]:
    """Undo `Kind.beside`: the trained factors and the frozen ones."""
    if experts:
        (A, A0), (B, B0) = A.chunk(2, 1), B.chunk(2, 2)
    else:
        g = max(A.shape[0] // max(B.shape[1], 1), 1)
        (A, A0), (B, B0) = (t.flatten(0, 1) for t in A.reshape(g, A.shape[0] // g, *A.shape[1:]).chunk(2, 1)), B.chunk(2, 1)
    return {"A": A, "B": B, "A0": A0, "B0": -B0}


class LoRALayout(Layout):
    """peft_type LORA."""

    peft_type = "LORA"
    methods = ("lora",)

    def __init__(self) -> None:
        self.depth: dict[tuple[str, str], int] = {}
        self.wrapped: set[str] = set()
        self.twice = True

    def names(self, file: TensorFile) -> dict[str, str]:
        return clean_names(file)

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        """Learn which ops share a module: nested names depend on it."""
        loras = [p for p in places if p.method == "lora"]
        self.wrapped = {p.path for p in loras}
        of_path: dict[str, set[str]] = {}
        for p in loras:
            of_path.setdefault(p.path, set()).add(p.param)
        for path, params in of_path.items():
            order = [name for name in model.get_submodule(path)._parameters if name in params]
            self.depth.update({(path, name): i for i, name in enumerate(reversed(order))})

    def codec(self, method: str) -> Codec:
        if method == "dense":
            return FullCodec()
        return BiasCodec(self.wrapped) if method == "bitfit" else LoRACodec(self.depth, self.twice)

    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        by_method = _paths(adapter)
        if set(by_method) - {"lora", "dense", "bitfit"}:
            return "it holds ops of other methods"
        full, lora = by_method.get("dense", {}), by_method.get("lora", {})
        if not lora:
            return "it holds no LoRA"
        if any(p == f or p.startswith(f"{f}.") for f in full for p in lora):
            return "a module is trained in full and carries a LoRA, too"
        if any(key.endswith("_proj_weight") and key != "in_proj_weight" for path, key in adapter.ops):
            return "it adapts separate attention projections"
        paths = list(base_modules(model))
        return "" if all(shortest(p, paths) for p in full) else "a fully trained module has no name of its own"

    # ---- writing ------------------------------------------------------------------------------------------------
    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        spec: Any = adapter.spec
        modules = base_modules(model)
        by_method = _paths(adapter)
        full, biases = by_method.get("dense", {}), by_method.get("bitfit", {})
        ops: list[tuple[str, Any]] = [(path, op) for (path, _), op in adapter.ops.items() if op.method == "lora"]
        experts = [(path, op) for path, op in ops if op.kind.name == "experts"]
        plain = {path for path, op in ops if op.kind.name != "experts"}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path, op in ops:
            where = f"{path}.{op.param}" if op.kind.name == "experts" else path
            r = op.r * (2 if op.A0 is not None else 1)
            ranks[where], alphas[where] = r, _alpha(op.scale, r, spec.rank_stabilised)
        r, alpha = _usual(ranks), _usual(alphas)
        about = about_model(model)
        heads = HEADS.get(about["task_type"] or "", set())
        if any(part in heads for path in plain for part in path.split(".")):
            about |= {"task_type": None}  # under this task the reference trains its head in full, and puts no LoRA there
        params = [f"{p}.{name}" for p, m in modules.items() for name in m._parameters]
        return {
            **DEFAULTS,
            **about,
            "peft_type": "LORA",
            "inference_mode": True,
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": to_pattern(ranks, r),
            "alpha_pattern": to_pattern(alphas, alpha),
            "use_rslora": spec.rank_stabilised,
            "lora_dropout": spec.dropout,
            "lora_bias": any(op.up_bias is not None for _, op in ops),
            "bias": "none" if not biases else "lora_only" if set(biases) <= plain else "all",
            "fan_in_fan_out": any(type(modules[p]).__name__ == "Conv1D" for p in plain),
            "modules_to_save": sorted(str(shortest(p, list(modules))) for p in full) or None,
            **(to_targets(plain, list(modules)) if plain else {"target_modules": []}),
            "target_parameters": to_targets({f"{p}.{op.param}" for p, op in experts}, params)["target_modules"] if experts else None,
        }

    # ---- reading what the reference wrote -----------------------------------------------------------------------
    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        check_config(config, file.path, relax)
        self.twice = _version(config["peft_version"]) <= TWICE
        modules = base_modules(model)
        taker = Taker(file, self.names(file))
        drop_base_copies(taker, modules, config, relax)
        places = lora_places(taker, modules, config)
        spec = spec_of(config)
        loras = {p.path for p in places}
        places += other_places(taker, modules, config, loras)
        self.prepare(places, model)
        places = [replace(p, settings=self._settings(p, modules[p.path], taker, config, spec)) if p.method == "lora" else p for p in places]
        all_there(config, modules, places, file, relax)
        return spec, places, taker

    def _settings(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any], spec: Spec) -> dict[str, Any]:
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
        return {"r": r, "scale": scale, "frozen_start": False, "up_bias": bias in taker, "wide": wide}


def clean_names(file: TensorFile) -> dict[str, str]:
    """Return names without the reference's prefix and wrapper words -> names in the file."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in file.entries) else ""
    out: dict[str, str] = {}
    for name in file.entries:
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            raise FormatError(f"{name[:100]!r} does not start with {prefix!r} like the rest", where=str(file.path))
        if ".original_module." in short:
            continue  # a copy of the base that bias="all" drags along
        alias = short.replace(".modules_to_save.", ".")
        if alias.endswith("bias") and not KEY.fullmatch(alias):
            alias = alias.replace("base_layer.", "")  # a bias of the base below a LoRA
        if alias != short and prefix + alias in file.entries:
            continue  # the same once more, for the same reason
        out[alias] = name
    return out


def _version(text: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", str(text or "0"))[:3])


def _paths(adapter: Adapter) -> dict[str, dict[str, Op]]:
    found: dict[str, dict[str, Op]] = {}
    for (path, _), op in adapter.ops.items():
        found.setdefault(op.method, {})[path] = op
    return found


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


