"""Spec: the recipe of an adapter: hyper-parameters, where it goes, and how one site's op is built.

Specs are frozen, keyword-only dataclasses with defaults for everything and no logic in the constructor; `check` reports all
problems at once. `to_dict` and `Spec.from_dict` are a JSON round trip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from slimtune.core.errors import SpecError, closest
from slimtune.core.op import Op
from slimtune.core.site import Site


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every method's recipe.

    Args:
        targets: role names, "all-linear", module-name suffixes, globs or a regex on full paths (see `core.targets`).
        layers: "last:4", "first:2" or "0,2-5": only these blocks of each stack of layers.
        exclude: patterns, like `targets`, of modules to leave alone.
        train_modules: patterns of modules trained in full beside the op (a new head), kept as a delta to the base.
    """

    method: ClassVar[str] = ""
    port: ClassVar[str] = "weight"
    optional: ClassVar[bool] = False  # as a part of another recipe: whether it may find no place for itself

    targets: str | tuple[str, ...] = "all-linear"
    layers: str | None = None
    exclude: str | tuple[str, ...] = ()
    train_modules: str | tuple[str, ...] = ()

    def build(self, site: Site) -> Op:
        """Return the op for one site, its tensors on `site.device` in `site.dtype`."""
        raise NotImplementedError

    def make(self, site: Site, part: int | None = None) -> Op:
        """Build the op for one site and note in it which recipe it is from.

        Args:
            site: as `Site.for_build` returns it.
            part: the index of this recipe in the `parts` of the adapter's own.
        """
        op = self.build(site)
        op.method, op.part = self.method, part
        return op

    def parts(self) -> tuple[Spec, ...]:
        """Return the recipes whose ops make up one adapter: this one, and full training of its `train_modules`."""
        if not self.train_modules:
            return (self,)
        from slimtune.methods.dense import Dense

        return (self, Dense(targets=self.train_modules))

    def problems(self) -> list[str]:
        """Return everything that is wrong with the hyper-parameters themselves."""
        return []

    def check(self, site: Site) -> list[str]:
        """Return everything that stops this spec from working at `site`."""
        return []

    def check_all(self, sites: list[Site]) -> list[str]:
        """Return everything that is wrong with the sites as a whole (a pattern that fits none of them)."""
        return []

    def prepare(self, sites: list[Site], shared: dict[str, Any]) -> None:
        """Note in `shared` what ops need to know of all sites together, before the first is built."""

    def wants_data(self) -> bool:
        """Tell whether this recipe starts from batches of the user's data: `st.attach(model, spec, data=batches)`."""
        return False

    def study(self, model: nn.Module, sites: list[Site], data: Iterable[Any], shared: dict[str, Any]) -> list[Site]:
        """Look at the data, note in `shared` what `build` needs of it, and return the sites to build.

        Args:
            data: batches as the model takes them.
        """
        return sites

    def before_load(self, model: nn.Module, settings: dict[str, dict[str, Any]]) -> None:
        """Raise, with what to do, if this base is not ready for the ops of a file.

        Args:
            settings: module path -> `Op.settings` of the op there.

        Raises:
            MismatchError: it is not.
        """

    def sites(self, model: nn.Module) -> list[Site]:
        """Return the sites this spec takes in a model (default: its targets, at its port)."""
        from slimtune.core.targets import find_sites

        return find_sites(model, self, self.port)

    def __str__(self) -> str:
        """Return the call that makes this spec, without what is left at its default."""
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={_written(getattr(self, f.name))}' for f in fields)})"

    # ---- JSON ---------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict, with the method's registered name under "method"."""
        out: dict[str, Any] = {"method": self.method}
        for f in dataclasses.fields(self):
            out[f.name] = _plain(getattr(self, f.name))
        return out

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Spec:
        """Build the spec that `to_dict` wrote.

        Raises:
            SpecError: unknown method, unknown field, wrong type or value; all of them at once.
        """
        from slimtune.core.registry import spec_class

        if not isinstance(data, dict) or not isinstance(data.get("method"), str):
            raise SpecError(f"a spec is a mapping with a 'method', not {str(data)[:80]!r}", hint='{"method": "lora", "r": 8}')
        cls = spec_class(data["method"])
        fields = {f.name: f for f in dataclasses.fields(cls)}
        wrong = [f"{k!r} is not an option of {data['method']}; closest: {closest(k, fields)}" for k in data if k not in {*fields, "method"}]
        values = {k: rich(v, str(fields[k].type)) for k, v in data.items() if k in fields}
        wrong += [p for k, v in values.items() if (p := type_problem(k, v, str(fields[k].type)))]
        if wrong:
            raise SpecError("; ".join(wrong), where=f"method {data['method']}", hint=f"options: {', '.join(fields)}")
        spec = cls(**values)
        spec.validate()
        return spec

    def validate(self) -> None:
        """Raise if any hyper-parameter has a wrong type or value, naming all of them.

        Raises:
            SpecError: with every problem.
        """
        wrong = [p for f in dataclasses.fields(self) if (p := type_problem(f.name, getattr(self, f.name), str(f.type)))]
        wrong = wrong or self.problems()
        if wrong:
            raise SpecError("; ".join(wrong), where=f"{type(self).__name__}(...)", hint="correct all of these at once")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a spec's field."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _written(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(v, Spec) for v in value):
        return f"({', '.join(map(str, value))},)" if len(value) == 1 else f"({', '.join(map(str, value))})"
    return str(value) if isinstance(value, Spec) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def rich(value: Any, annotation: str) -> Any:
    """Return a JSON value as a field of this type holds it: lists as tuples, mappings with a "method" as specs, its bare name too.

    Raises:
        SpecError: a spec inside it is wrong.
    """
    if isinstance(value, dict) and isinstance(value.get("method"), str):
        return Spec.from_dict(value)
    if isinstance(value, str) and "Spec" in annotation:
        return Spec.from_dict({"method": value})
    if isinstance(value, (list, tuple)):
        return tuple(rich(v, annotation) for v in value)
    return value


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
    "tuple": (tuple,),
    "dict": (dict,),
    "Spec": (Spec,),
}


_MEMBERS: dict[str, type] = {"tuple[str,...]": str, "tuple[Spec,...]": Spec}


def type_problem(name: str, value: Any, annotation: str) -> str:
    """Return what is wrong with a value's type by its field's annotation (unions of plain types), or ""."""
    depth, parts, word = 0, [], ""
    for c in annotation.replace(" ", "") + "|":  # split the union at the top level only
        depth += (c == "[") - (c == "]")
        if c == "|" and depth == 0:
            parts.append(word)
            word = ""
        else:
            word += c
    for part in parts:
        kind = part.split("[")[0]
        if kind not in _TYPES:
            return ""
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in {"int", "float"}):
            continue
        if part in _MEMBERS and isinstance(value, tuple) and not all(isinstance(v, _MEMBERS[part]) for v in value):
            continue
        return ""
    return f"{name} must be {annotation}, not {value!r}"
