"""Reading LoRA files of the reference: from its config and tensor names to a spec and the places of the ops."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from slimtune.core.errors import MismatchError
from slimtune.core.spec import Spec
from slimtune.files.layouts.base import Place, Taker
from slimtune.files.layouts.patterns import from_key, named_by
from slimtune.files.layouts.reading import kind_known, module_named, where_to

KEY = re.compile(
    r"(?P<path>.*?)\.?(?P<tensor>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)


def spec_of(config: dict[str, Any], pooled: bool = False) -> Spec:
    """Return the recipe that a config describes; what differs by module is in the settings of the ops.

    Args:
        pooled: the inputs of the file's factors are pooled (QA-LoRA).
    """
    from slimtune.methods.dora import DoRA
    from slimtune.methods.lora import LoRA
    from slimtune.methods.qa_lora import QALoRA

    where = where_to(config)
    if pooled:
        options = {"r": config["r"], "alpha": float(config["lora_alpha"]), "dropout": float(config["lora_dropout"])}
        return QALoRA(**options, group=config["qalora_group_size"], pool="mean", **where)
    if config["target_parameters"]:
        targets = where["targets"]
        where["targets"] = ("experts",) if not targets else (*([targets] if isinstance(targets, str) else targets), "experts")
    values: dict[str, Any] = {
        "r": config["r"], "alpha": float(config["lora_alpha"]), "rank_stabilised": config["use_rslora"], "dropout": float(config["lora_dropout"]),
        "up_bias": config["lora_bias"],
        "rank_pattern": {from_key(k): v for k, v in config["rank_pattern"].items()} or None,
        "alpha_pattern": {from_key(k): v for k, v in config["alpha_pattern"].items()} or None,
    }  # fmt: skip
    return DoRA(of=LoRA(**values), **where) if config["use_dora"] else LoRA(**values, **where)


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
        module = module_named(path, modules, taker.file)
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
        places.append(Place(path, param, "weight", param, "dora" if config["use_dora"] else "lora"))
    order_of = {path: i for i, path in enumerate(modules)}
    params = {p: i for p in modules for i, p in enumerate(modules[p]._parameters)}
    return sorted(places, key=lambda p: (order_of[p.path], params.get(p.param, 99)))
