"""Reading LoRA files of the reference: from its config and tensor names to a spec and the places of the ops."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from slimtune.core.errors import FormatError, MismatchError, SpecError, closest
from slimtune.core.kind import Kind
from slimtune.core.spec import Spec
from slimtune.core.targets import kind_of
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import Place, Taker
from slimtune.files.layouts.patterns import (
    from_key,
    from_targets,
    layer_number,
    named_by,
)  # fmt: skip

KEY = re.compile(r"(?P<path>.*?)\.?(?P<tensor>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")


def kind_known(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert kind is not None, "the kind of any module is known: BlockKind fits all"
    return kind


def look_up(patterns: dict[str, Any], path: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(value)
    return default


def spec_of(config: dict[str, Any]) -> Spec:
    from slimtune.methods.lora import LoRA

    layers = config["layers_to_transform"]
    layers = [layers] if isinstance(layers, int) else layers
    targets = from_targets(config["target_modules"] or [])
    if config["target_parameters"]:
        targets = ("experts",) if not targets else (*([targets] if isinstance(targets, str) else targets), "experts")
    values: dict[str, Any] = {
        "r": config["r"], "alpha": float(config["lora_alpha"]), "rank_stabilised": config["use_rslora"], "dropout": float(config["lora_dropout"]),
        "up_bias": config["lora_bias"], "targets": targets or (), "layers": ",".join(map(str, layers)) if layers else None,
        "exclude": from_targets(config["exclude_modules"] or []),
        "rank_pattern": {from_key(k): v for k, v in config["rank_pattern"].items()} or None,
        "alpha_pattern": {from_key(k): v for k, v in config["alpha_pattern"].items()} or None,
        "train_modules": tuple(from_targets([m])[0] for m in config["modules_to_save"] or ()),
    }  # fmt: skip
    spec = LoRA(**values)
    try:
        spec.validate()
    except SpecError as error:
        raise FormatError(f"adapter_config.json describes no LoRA that makes sense: {error.what}") from None
    return spec


def lora_places(taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any]) -> list[Place]:
    """Return the places of the LoRA ops by the names in the file, in the order of the model."""
    heads: dict[str, None] = {}
    for name in taker.left:
        if found := KEY.fullmatch(name):
            heads[found["path"]] = None
    places = []
    for head in heads:
        path, param, levels = head, "weight", 0
        if head.endswith("base_layer.out_proj"):
            path, param = head.removesuffix("base_layer.out_proj").rstrip("."), "out_proj"
        while path.endswith("base_layer"):
            path, levels = path.removesuffix("base_layer").rstrip("."), levels + 1
        module = modules.get(path)
        if module is None:
            last = path.rpartition(".")[2]
            raise MismatchError(
                f"the file adapts {path!r}, which this model does not have",
                where=str(taker.file.path),
                hint=f"closest: {closest(path, [p for p in modules if p.endswith(last)] or list(modules))}; is it the right base?",
            )
        kind = kind_known(module)
        if kind.name == "attention" and param == "weight":
            param = "in_proj_weight"
        if kind.name == "experts" and config["target_parameters"]:
            wanted = named_by(config["target_parameters"], [f"{path}.{p}" for p in module._parameters])
            order = [p for p in module._parameters if f"{path}.{p}" in wanted]
            if levels >= len(order):
                raise MismatchError(f"the file nests {levels + 1} parameters at {path}, its config names {len(order)}", where=str(taker.file.path))
            param, levels = order[len(order) - 1 - levels], 0
        if "weight" not in kind.ports or param not in kind.names(module) or levels:
            raise MismatchError(f"a {type(module).__name__} takes no LoRA on {param!r}", where=path, hint="is it the right base?")
        if problem := kind.problem(module):
            raise MismatchError(problem, where=path)
        places.append(Place(path, param, "weight", param, "lora"))
    order_of = {path: i for i, path in enumerate(modules)}
    params = {p: i for p in modules for i, p in enumerate(modules[p]._parameters)}
    return sorted(places, key=lambda p: (order_of[p.path], params.get(p.param, 99)))


def other_places(taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any], loras: set[str]) -> list[Place]:
    """Return the places of fully trained modules and of trained biases."""
    saved = config["modules_to_save"] or []
    places: dict[tuple[str, str], Place] = {}
    for name in list(taker.left):
        if KEY.fullmatch(name):
            continue
        path, _, tensor = name.rpartition(".")
        full = any(path == p or path.startswith(f"{p}.") for p in modules for m in saved if p.endswith(m)) if saved else False
        weight = "in_proj_weight" if tensor == "in_proj_bias" else "weight" if tensor == "bias" else tensor
        parent = path.rpartition(".")[0]
        if path.endswith("out_proj") and parent in modules and kind_known(modules[parent]).name == "attention":
            path, weight = parent, "out_proj"
        module = modules.get(path)
        if module is None:
            continue  # stays in `left`: reported as unexpected
        kind = kind_known(module)
        if "weight" not in kind.ports or weight not in kind.names(module):
            continue
        if full:
            places[path, weight] = Place(path, weight, "weight", weight, "dense")
        elif tensor == "bias" and config["bias"] != "none" and kind.takes_bias:
            places[path, weight] = Place(path, f"{weight}+" if path in loras else weight, "weight", weight, "bitfit")
    return list(places.values())


def drop_base_copies(taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any], relax: frozenset[str]) -> None:
    """Check the copies of embedding weights that the reference adds when embeddings are targeted: they must be those of this base."""
    for name in list(taker.left):
        path = name.removesuffix(".weight").removesuffix(".base_layer")
        module = modules.get(path)
        if not name.endswith(".weight") or module is None or KEY.fullmatch(name):
            continue
        if not name.endswith(".base_layer.weight") and not path.endswith(("embed_tokens", "lm_head")):
            continue
        if any(path.endswith(m) for m in config["modules_to_save"] or []):
            continue
        own = kind_known(module).read(module, "weight").detach().cpu()
        theirs = taker.take(name)
        assert theirs is not None
        close = own.shape == theirs.shape and torch.allclose(own.float(), theirs.float(), rtol=2e-2, atol=1e-6)
        if not close and "base" not in relax:
            raise MismatchError(
                f"the file brings its own {path}.weight {list(theirs.shape)}, which is not that of this model {list(own.shape)}",
                where=str(taker.file.path),
                hint="load the base it was trained on (after model.resize_token_embeddings, if tokens were added), or st.load(..., relax='base')",
            )


def all_there(config: dict[str, Any], modules: dict[str, nn.Module], places: list[Place], file: TensorFile, relax: frozenset[str]) -> None:
    """Raise unless every module that the config targets has its tensors in the file."""
    have = {p.path for p in places if p.method == "lora"}
    if not have:
        raise FormatError(f"{file.path.name} holds no LoRA tensor", where=str(file.path))
    targets = config["target_modules"]
    if targets is None or targets == "all-linear" or "missing" in relax:
        return
    named = named_by(targets, modules) - named_by(config["exclude_modules"] or [], modules)
    named = {p for p in named if not any(re.match(rf"(^|.*\.){m}($|\..*)", p) for m in config["modules_to_save"] or [])}
    layers = config["layers_to_transform"]
    if layers is not None and layers != [] and not isinstance(targets, str):
        wanted = {layers} if isinstance(layers, int) else set(layers)
        named = {p for p in named if _number(p, config["layers_pattern"]) in wanted}
    absent = sorted(p for p in named - have if kind_known(modules[p]).name in {"linear", "conv", "embedding", "attention"})
    if absent:
        raise MismatchError(
            f"{len(absent)} module(s) that the config targets have no tensors in the file: {', '.join(absent[:4])}",
            where=str(file.path),
            hint="fetch the file again; to load what there is: st.load(..., relax='missing')",
        )


def _number(path: str, stacks: str | list[str] | None) -> int | None:
    if not stacks:
        return layer_number(path)
    for stack in [stacks] if isinstance(stacks, str) else stacks:
        if found := re.match(rf"(?:^|.*?\.){stack}\.(\d+)\.", path):
            return int(found[1])
    return None
