"""What reading the files of every method of the reference has in common: names, full modules and biases, copies of the base, completeness."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slimtune.core.errors import FormatError, MismatchError, SpecError, closest
from slimtune.core.kind import Kind
from slimtune.core.spec import Spec
from slimtune.core.still import tracks
from slimtune.core.targets import kind_of
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import OUTSIDE, PREFIX, Place, Taker
from slimtune.files.layouts.patterns import from_targets, layer_number, named_by
from slimtune.files.layouts.reference import HEADS
from slimtune.methods.trainable_tokens import tied_with


def kind_known(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert kind is not None, "the kind of any module is known: BlockKind fits all"
    return kind


def look_up(patterns: dict[str, Any], path: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(value)
    return default


def clean_names(file: TensorFile, key: re.Pattern[str]) -> dict[str, str]:
    """Return names without the reference's prefix and wrapper words -> names in the file.

    Args:
        key: matches the method's own tensors.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in file.entries) else ""
    out: dict[str, str] = {}
    for name in file.entries:
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            if name.startswith(OUTSIDE):
                out[name] = name
                continue
            raise FormatError(f"{name[:100]!r} does not start with {prefix!r} like the rest", where=str(file.path))
        if ".original_module." in short:
            continue  # a copy of the base that bias="all" drags along
        alias = short.replace(".modules_to_save.", ".")
        if alias.endswith("bias") and not key.fullmatch(alias):
            alias = alias.replace("base_layer.", "")  # a bias of the base below an op
        if alias != short and prefix + alias in file.entries:
            continue  # the same once more, for the same reason
        out[alias] = name
    return out


def module_named(path: str, modules: dict[str, nn.Module], file: TensorFile) -> nn.Module:
    """Return the module at a path of the file.

    Raises:
        MismatchError: the model has none.
    """
    module = modules.get(path)
    if module is None:
        last = path.rpartition(".")[2]
        raise MismatchError(
            f"the file adapts {path!r}, which this model does not have",
            where=str(file.path),
            hint=f"closest: {closest(path, [p for p in modules if p.endswith(last)] or list(modules))}; is it the right base?",
        )
    return module


def op_places(taker: Taker, modules: dict[str, nn.Module], key: re.Pattern[str], method: str) -> list[Place]:
    """Return a place for every module that has tensors of the method, one on its weight, in the order of the model.

    Raises:
        MismatchError: a module is not there, or cannot carry the op.
    """
    heads = dict.fromkeys(found["path"] for name in taker.left if (found := key.fullmatch(name)))
    places = []
    for path in heads:
        module = module_named(path, modules, taker.file)
        kind = kind_known(module)
        if "weight" not in kind.ports or kind.names(module) != ("weight",):
            raise MismatchError(f"a {type(module).__name__} takes no {method} on its weight", where=path, hint="is it the right base?")
        if problem := kind.problem(module):
            raise MismatchError(problem, where=path)
        places.append(Place(path, "weight", "weight", "weight", method))
    order_of = {path: i for i, path in enumerate(modules)}
    return sorted(places, key=lambda p: order_of[p.path])


def other_places(
    taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any], wrapped: set[str], key: re.Pattern[str]
) -> list[Place]:
    """Return the places of fully trained modules and of trained biases.

    Args:
        wrapped: the paths of modules that carry an op.
        key: matches the method's own tensors.
    """
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    places: dict[tuple[str, str], Place] = {}
    for name in list(taker.left):
        if key.fullmatch(name):
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
        elif tensor == "bias" and config.get("bias", "none") != "none" and kind.takes_bias:
            places[path, weight] = Place(path, f"{weight}+" if path in wrapped else weight, "weight", weight, "bitfit")
    return list(places.values())


def base_copies(
    taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any], relax: frozenset[str], key: re.Pattern[str]
) -> list[Place]:
    """Take the tables of tokens out of a file that the reference adds when they are targeted or were resized: a copy of this base's own is dropped,
    one with some other rows (of new tokens, trained or drawn at random) is read as a table in full.

    Returns:
        The places of those tables, and of all that is tied to them.

    Raises:
        MismatchError: a table has another size than the one here, or is that of another base.
    """
    places: list[Place] = []
    for name in list(taker.left):
        path = name.removesuffix(".weight").removesuffix(".base_layer")
        module = modules.get(path)
        if not name.endswith(".weight") or module is None or key.fullmatch(name):
            continue
        if not name.endswith(".base_layer.weight") and not path.endswith(("embed_tokens", "lm_head")):
            continue
        if any(path.endswith(m) for m in config.get("modules_to_save") or []):
            continue
        kind = kind_known(module)
        own, theirs = kind.read(module, "weight").detach().cpu(), taker.look(name)
        if own.shape != theirs.shape:
            raise MismatchError(
                f"the file brings its own {path}.weight {list(theirs.shape)}, which does not fit that of this model {list(own.shape)}",
                where=str(taker.file.path),
                hint=f"it was trained after tokens were added or taken away: model.resize_token_embeddings({theirs.shape[0]}) first, then load it",
            )
        same = torch.isclose(own.float(), theirs.float(), rtol=2e-2, atol=1e-6).all(1)  # [rows]
        if bool(same.all()):
            taker.take(name)
            continue
        if same.float().mean() < 0.5 and "base" not in relax:
            raise MismatchError(
                f"the file brings its own {path}.weight, and {int((~same).sum()):,} of its {len(same):,} rows are not those of this model",
                where=str(taker.file.path),
                hint="load the base it was trained on; to put the file's table over that of another base: st.load(..., relax='base')",
            )
        taker.notes.append(f"the file brings its own {path}.weight, with {int((~same).sum()):,} other rows than here: it is used in full")
        for at in (path, *tied_with(modules[""], module)):
            if at == path or not any(f"{at}{middle}.weight" in taker for middle in (".base_layer", "")):
                taker.alias(f"{at}.weight", name)
                places.append(Place(at, "weight", "weight", "weight", "dense"))
    return places


def same_statistics(taker: Taker, modules: dict[str, nn.Module]) -> None:
    """Take batch norms out of a file (the reference trains them in full where its user asks for it): they must be those of this base.

    Raises:
        MismatchError: they are not, with what puts them into the base.
    """
    off = []
    for name in list(taker.left):
        path, _, short = name.rpartition(".")
        module = modules.get(path)
        own = {**module._parameters, **module._buffers}.get(short) if module is not None and tracks(module) else None
        if own is None:
            continue
        theirs = taker.look(name)
        taker.left.pop(name)
        if own.shape != theirs.shape or not torch.allclose(own.detach().cpu().float(), theirs.float(), rtol=1e-3):
            off.append(name)
    if off:
        raise MismatchError(
            f"the file brings {len(off)} tensors of the base's batch norms as training left them, and this base has others: {', '.join(off[:2])}",
            where=str(taker.file.path),
            hint="put them into the base first, then load: "
            f"model.load_state_dict({{k.removeprefix({PREFIX!r}): v for k, v in safetensors.torch.load_file({str(taker.file.path)!r}).items() "
            f"if k.removeprefix({PREFIX!r}) in model.state_dict()}}, strict=False)",
        )


def all_there(
    config: dict[str, Any], modules: dict[str, nn.Module], have: set[str], file: TensorFile, relax: frozenset[str], kinds: Iterable[str]
) -> None:
    """Raise unless every module that the config targets has its tensors in the file.

    Args:
        have: paths of the modules that have.
        kinds: names of the kinds of modules that the method adapts.

    Raises:
        MismatchError: naming those without.
    """
    targets = config["target_modules"]
    if targets is None or targets == "all-linear" or "missing" in relax:
        return
    named = named_by(targets, modules) - named_by(config.get("exclude_modules") or [], modules)
    saved = config.get("modules_to_save") or []
    named = {p for p in named if not any(re.match(rf"(^|.*\.){m}($|\..*)", p) for m in ([saved] if isinstance(saved, str) else saved))}
    layers = config.get("layers_to_transform")
    if layers is not None and layers != [] and not isinstance(targets, str):
        wanted = {layers} if isinstance(layers, int) else set(layers)
        named = {p for p in named if _number(p, config.get("layers_pattern")) in wanted}
    absent = sorted(p for p in named - have if kind_known(modules[p]).name in set(kinds))
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


def where_to(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `Spec` that the fields about targets mean."""
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    saved = config.get("modules_to_save") or ()
    return {
        "targets": from_targets(config["target_modules"] or []) or (),
        "layers": ",".join(map(str, layers)) if layers else None,
        "exclude": from_targets(config.get("exclude_modules") or []),
        "train_modules": tuple(from_targets([m])[0] for m in ([saved] if isinstance(saved, str) else saved)),
    }


def sensible(spec: Spec) -> Spec:
    """Return a spec that was made from a file's config.

    Raises:
        FormatError: its values make no sense.
    """
    try:
        spec.validate()
    except SpecError as error:
        raise FormatError(f"adapter_config.json describes nothing that makes sense: {error.what}", where=error.where) from None
    return spec


def drop_absent_heads(config: dict[str, Any], modules: dict[str, nn.Module]) -> None:
    """Take heads out of `modules_to_save` that this model does not have: the reference names some for any model of a task."""
    known = HEADS.get(config["task_type"] or "", set())
    config["modules_to_save"] = [m for m in config["modules_to_save"] or [] if m not in known or any(path.endswith(m) for path in modules)]
