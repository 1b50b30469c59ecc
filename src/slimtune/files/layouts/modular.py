"""A method of the reference whose ops sit on named modules: what their layouts share, so that one more takes a table of fields and a codec."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from slimtune.core.errors import FormatError
from slimtune.core.op import Op
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import Codec, Layout, Place, Taker
from slimtune.files.layouts.config import Fields, check_config
from slimtune.files.layouts.full import BiasCodec, FullCodec
from slimtune.files.layouts.older_names import gather_experts, rename
from slimtune.files.layouts.patterns import shortest, to_targets
from slimtune.files.layouts.reading import all_there, base_copies, clean_names, op_places, other_places, same_statistics, sensible
from slimtune.files.layouts.reference import HEADS, about_model


class ModularLayout(Layout):
    """Targets, full modules, biases, task, checks; a subclass adds the tensors and the options.

    Attributes:
        fields: of the config.
        key: matches the names of the method's tensors; groups "path" and "tensor".
        kinds: names of the kinds of modules that the method adapts in the reference.
        besides: methods whose ops it can hold beside its own.
        wrapped: the paths of modules that carry an op, once `prepare` ran.
    """

    fields: ClassVar[Fields]
    key: ClassVar[re.Pattern[str]]
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    besides: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.wrapped: set[str] = set()

    # ---- what a method adds -------------------------------------------------------------------------------------
    def op_codec(self, method: str) -> Codec:
        """Return the codec of the method's own ops."""
        raise NotImplementedError

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        """Return why the reference cannot hold these ops, or "".

        Args:
            ops: module path -> op of the method.
        """
        return ""

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        """Return the config fields of the method itself."""
        raise NotImplementedError

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        """Return the spec that a config describes."""
        raise NotImplementedError

    def settings(self, place: Place, module: nn.Module, taker: Taker, config: dict[str, Any], spec: Spec) -> dict[str, Any]:
        """Return `Op.settings` of an op in a file of the reference."""
        return {}

    # ---- shared -------------------------------------------------------------------------------------------------
    def names(self, file: TensorFile) -> dict[str, str]:
        return clean_names(file, self.key)

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        self.wrapped = {p.path for p in places if p.method in self.methods}

    def codec(self, method: str) -> Codec:
        if method == "dense" and method not in self.methods:
            return FullCodec()
        return BiasCodec(self.wrapped) if method == "bitfit" else self.op_codec(method)

    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        by_method = paths_of(adapter)
        beside = {"dense", *self.besides, *(["bitfit"] if "bias" in self.fields.defaults else [])}
        if set(by_method) - {*self.methods, *beside}:
            return "it holds ops of other methods"
        ops = self.own(adapter)
        if not ops:
            return "it holds no op of the method"
        full = {} if "dense" in self.methods else by_method.get("dense", {})
        if full and "modules_to_save" not in self.fields.defaults:
            return "the reference trains no modules in full beside this method"
        if any(p == f or p.startswith(f"{f}.") for f in full for p in ops):
            return "a module is trained in full and carries an op, too"
        if any(op.kind.bias(model.get_submodule(path), op.param) is None for path, op in by_method.get("bitfit", {}).items()):
            return "it gives a bias to a module that has none"
        paths = list(base_modules(model))
        if not all(shortest(p, paths) for p in full):
            return "a fully trained module has no name of its own"
        return self.unfit(adapter, ops)

    def own(self, adapter: Adapter) -> dict[str, Op]:
        """Return module path -> op of the method's own."""
        return {path: op for (path, _), op in adapter.ops.items() if op.method in self.methods}

    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        ops, modules = self.own(adapter), base_modules(model)
        return {
            **self.fields.all(self.peft_type),
            **self.beside(adapter, model, set(ops)),
            **self.where(set(ops), list(modules)),
            **self.options(adapter, model, ops),
        }

    def where(self, wanted: Collection[str], paths: Collection[str]) -> dict[str, Any]:
        """Return the config fields that name the modules with ops."""
        return to_targets(wanted, paths, layers="layers_to_transform" in self.fields.defaults)

    def beside(self, adapter: Adapter, model: nn.Module, wanted: set[str]) -> dict[str, Any]:
        """Return the config fields about the base, and about what is trained beside the method's ops: full modules and biases.

        Args:
            wanted: the paths of modules with ops.
        """
        by_method, modules = paths_of(adapter), base_modules(model)
        full = [] if "dense" in self.methods else sorted(by_method.get("dense", {}))
        biases, has = set(by_method.get("bitfit", {})), self.fields.defaults
        about = about_model(model)
        heads = HEADS.get(about["task_type"] or "", set()) & {p.rpartition(".")[2] for p in modules}
        saved = {part for p in full for part in p.split(".")}
        if any(part in heads for path in wanted for part in path.split(".")) or heads - saved:
            about = about_model(model, tasked=False)  # under this task the reference trains its head in full, and wants it in the file
        out: dict[str, Any] = {"inference_mode": True, **about}
        if "modules_to_save" in has:
            out["modules_to_save"] = sorted(str(shortest(p, list(modules))) for p in full) or None
        if "bias" in has:
            out["bias"] = "none" if not biases else self.own_biases if biases <= wanted else "all"
        if "fan_in_fan_out" in has:
            out["fan_in_fan_out"] = any(type(modules[p]).__name__ == "Conv1D" for p in wanted)
        return out

    @property
    def own_biases(self) -> str:
        """What the reference calls the biases of the modules with ops."""
        return f"{self.peft_type.lower()}_only"

    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        self.check(config, file, relax)
        modules = base_modules(model)
        taker = Taker(file, self.names(file))
        rename(taker, modules, self.key)
        if "target_parameters" in config:
            gather_experts(taker, modules, config, self.key)
        same_statistics(taker, modules)
        tables = base_copies(taker, modules, config, relax, self.key)
        places = self.places(taker, modules, config)
        if not places:
            raise FormatError(f"{file.path.name} holds no tensor of a {self.peft_type}", where=str(file.path))
        spec = sensible(self.recipe(config, places, model))
        places += other_places(taker, modules, config, {p.path for p in places}, self.key)
        self.prepare(places, model)
        mine = set(self.methods)
        places = [
            replace(p, settings=self.settings(p, modules[p.path], taker, config, spec)) if p.method in mine and not p.settings else p for p in places
        ]
        all_there(config, modules, {p.path for p in places if p.method in mine}, file, relax, self.kinds)
        return spec, [*tables, *places], taker

    def check(self, config: dict[str, Any], file: TensorFile, relax: frozenset[str]) -> None:
        """Check the config and fill in its defaults."""
        check_config(config, file.path, relax, self.fields)

    def places(self, taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any]) -> list[Place]:
        """Return the places of the method's ops by the names in the file."""
        return op_places(taker, modules, self.key, self.methods[0])


def paths_of(adapter: Adapter) -> dict[str, dict[str, Op]]:
    """Return method -> module path -> op."""
    found: dict[str, dict[str, Op]] = {}
    for (path, _), op in adapter.ops.items():
        found.setdefault(op.method, {})[path] = op
    return found
