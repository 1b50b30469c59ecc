"""Names of files that were written when transformers had its modules elsewhere: the text part of vision-language models, experts one by one.

transformers keeps the renamings of its own checkpoints for each model class; the same renamings move an adapter's tensors. Where they lead nowhere,
a module that is the only one with the same end of its path (its block's number in it) is meant. Experts that were linear layers of their own are
one parameter for all of them today: their low-rank pairs are put together, side by side where two layers became one (gate and up): of rank 2 r,
with the same scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import MismatchError
from slimtune.files.layouts.base import Taker, dotted

_WRAPPERS = ("base_layer", "token_adapter")
Convert = tuple[list[re.Pattern[str]], str]  # (one pattern for each layer that an expert had, end of the parameter's path)


def rename(taker: Taker, modules: dict[str, nn.Module], key: re.Pattern[str]) -> None:
    """Let tensors of modules that this model has under other names today be known by these.

    Args:
        taker: the file's tensors.
        modules: of the base, by path.
        key: matches the names of the method's tensors.
    """
    paths: dict[str, list[str]] = {}
    for name in taker.left:
        paths.setdefault(_path_of(name, key), []).append(name)
    older = [path for path in paths if path and path not in modules]
    if not older:
        return
    renamings = conversions(modules[""])[0]
    guessed: dict[str, str] = {}
    for path in older:
        new = path
        for renaming in renamings:
            new = renaming(f"{new}.weight").removesuffix(".weight")
        found = new if new in modules else _by_end(new, modules)
        if found is not None and found != new:
            guessed[path] = found
        if found is not None or new != path:
            for name in paths[path]:
                taker.alias((found or new) + name[len(path) :], name)
                taker.left[(found or new) + name[len(path) :]] = None
    if guessed:
        old, new = next(iter(guessed.items()))
        taker.notes.append(f"{len(guessed)} modules of the file have other names here, found by the end of their paths: {old} is {new}")


def _path_of(name: str, key: re.Pattern[str]) -> str:
    found = key.fullmatch(name)
    parts = (found["path"] if found else name.rpartition(".")[0]).split(".")
    while parts and parts[-1] in _WRAPPERS:
        parts.pop()
    return ".".join(parts)


def _by_end(path: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the only module whose path has the longest end in common with this one, if a block's number is in it."""
    parts = path.split(".")
    for start in range(len(parts)):
        end = parts[start:]
        if end[-1].isdigit() or not any(part.isdigit() for part in end):
            return None
        fitting = [p for p in modules if p.split(".")[-len(end) :] == end]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def conversions(model: nn.Module) -> tuple[list[Callable[[str], str]], list[Convert]]:
    """Return what transformers does to the names of a model's older checkpoints: renamings, and experts put together.

    It assumes of transformers: `conversion_mapping.get_model_conversion_mapping(model)` gives transforms with `rename_source_key`, or with
    `source_patterns`, `target_patterns` and `operations`.
    """
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return [], []
    from transformers import conversion_mapping

    renamings: list[Callable[[str], str]] = []
    experts: list[Convert] = []
    for transform in conversion_mapping.get_model_conversion_mapping(model, add_legacy=False):  # type: ignore[arg-type]
        steps = [type(step).__name__ for step in getattr(transform, "operations", None) or []]
        if not steps:
            renamings.append(lambda name, t=transform: t.rename_source_key(name)[0])  # type: ignore[misc]
        elif steps in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and len(transform.target_patterns) == 1:
            sources = [_glob(p) for p in getattr(transform, "_original_source_patterns", transform.source_patterns)]
            experts.append((sources, transform.target_patterns[0].removeprefix(".")))
    return renamings, experts


def _glob(pattern: str) -> re.Pattern[str]:
    head, _, tail = pattern.removeprefix(".").removesuffix(".weight").partition("*")
    return re.compile(rf"(?P<at>.*\.|){re.escape(head)}(?P<expert>\d+){re.escape(tail)}")


def gather_experts(taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any], key: re.Pattern[str]) -> None:
    """Put the pairs of experts that were layers of their own together, as the file's config would name and hold them today.

    Raises:
        MismatchError: some experts of a block have pairs and others have none.
    """
    held: dict[str, None] = {}
    for name in taker.left:
        found = key.fullmatch(name)
        if found and found["tensor"] in {"lora_A.weight", "lora_B.weight"} and found["path"] not in modules:
            held[found["path"]] = None
    if not held:
        return
    made: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    factors: dict[str, int] = {}
    for sources, target in conversions(modules[""])[1]:
        groups: dict[str, dict[tuple[int, int], str]] = {}  # where -> (which of the sources, expert) -> path of the layer
        for path in held:
            for i, source in enumerate(sources):
                if found := source.fullmatch(path):
                    groups.setdefault(found["at"], {})[i, int(found["expert"])] = path
        for at, layers in groups.items():
            parent, _, param = f"{at}{target}".rpartition(".")
            module = modules.get(parent)
            if module is not None and param in module._parameters:
                made.setdefault(parent, {})[param] = _gathered(taker, module, f"{parent}.{param}", layers, len(sources))
                factors[f"{parent}.{param}"] = len(sources)
    for parent, pairs in made.items():
        order = [p for p in modules[parent]._parameters if p in pairs]  # the last one stands at X, the one before at X.base_layer, and so on
        for below, param in enumerate(reversed(order)):
            A, B = pairs[param]
            at = dotted(parent, *["base_layer"] * below)
            taker.add(dotted(at, "lora_A.weight"), A.flatten(0, 1))  # [E r, a]
            taker.add(dotted(at, "lora_B.weight"), B.permute(1, 2, 0).flatten(1, 2))  # [b, r E]
    if factors:
        _tell(config, modules, factors)


def _tell(config: dict[str, Any], modules: dict[str, nn.Module], factors: dict[str, int]) -> None:
    """Describe in the config what was put together: a rank several times as large, with the same scale.

    Args:
        factors: path of a parameter -> how many layers it was.
    """
    r, alpha = config["r"], config["lora_alpha"]
    config["target_parameters"] = [*(config["target_parameters"] or []), *factors]
    config["rank_pattern"] = {**config["rank_pattern"], **{re.escape(p): n * r for p, n in factors.items()}}
    scales = {p: n**0.5 if config["use_rslora"] else float(n) for p, n in factors.items()}
    config["alpha_pattern"] = {**config["alpha_pattern"], **{re.escape(p): alpha * scale for p, scale in scales.items()}}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = [m for m in config["target_modules"] if any(path.endswith(m) for path in modules)]


def _gathered(taker: Taker, module: nn.Module, where: str, layers: dict[tuple[int, int], str], parts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, parts r, a] and B [E, b, parts r] of all experts' pairs.

    Args:
        where: path of the parameter.
        layers: (which part, expert) -> path of the layer in the file.
        parts: how many layers of an expert are one parameter today.
    """
    E, b, a = module._parameters[where.rpartition(".")[2]].shape  # type: ignore[union-attr]
    if missing := {(i, e) for i in {i for i, _ in layers} for e in range(E)} - set(layers):
        raise MismatchError(f"{len(missing)} experts' layers of {where} have no pair in the file, others have", where=str(taker.file.path))
    pairs = {at: (taker.take(dotted(path, "lora_A.weight")), taker.take(dotted(path, "lora_B.weight"))) for at, path in layers.items()}
    first = next(iter(pairs.values()))[0]
    r, rows = (0 if first is None else first.shape[0]), b // parts
    A, B = torch.zeros(E, parts * r, a), torch.zeros(E, b, parts * r)
    for (i, e), (down, up) in pairs.items():
        if down is None or up is None or down.shape != (r, a) or up.shape != (rows, r) or e >= E:
            raise MismatchError(f"the pair of {layers[i, e]} does not fit {where} {[E, b, a]}", where=str(taker.file.path))
        A[e, i * r : (i + 1) * r] = down
        B[e, i * rows : (i + 1) * rows, i * r : (i + 1) * r] = up
    return A, B
