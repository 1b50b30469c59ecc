"""Spec: the recipe of an adapter: hyper-parameters, where it goes, and how one site's op is built.

Specs are frozen, keyword-only dataclasses with defaults for everything. Their class reads what is written (see `core.options`): a list where a
tuple is meant, block numbers for `layers`; what cannot be read stays as it is, and `validate` reports all problems at once. `to_dict` and
`Spec.from_dict` are a JSON round trip.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from abc import ABCMeta
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import nn

from slimtune.core.errors import SpecError, closest
from slimtune.core.op import Op
from slimtune.core.options import Reads, blocks, hints_of, none_as_empty, problem, read, written
from slimtune.core.site import Site
from slimtune.core.spec_hints import options_by_name, unknown_options

AUTO = "auto"


class SpecType(ABCMeta):
    """The class of spec classes: what is written in a call becomes options, before any constructor runs."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        """Return a spec.

        Raises:
            SpecError: an option has no name, or one that this method does not know.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if args and all(f.kw_only for f in fields.values()):
            raise options_by_name(cls, args)
        if unknown := [name for name in options if name not in fields]:
            raise unknown_options(cls, unknown, options)
        hints = hints_of(cls)
        return super().__call__(*args, **{name: read(value, hints[name]) for name, value in options.items()})

    @property
    def __signature__(cls) -> inspect.Signature:
        """What `help` and editors show: the options, not the call above."""
        if "__init__" not in vars(cls) and cls.__bases__ and isinstance(cls.__bases__[0], SpecType):
            return inspect.signature(cls.__bases__[0])
        hints, own = hints_of(cls), list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
        return inspect.Signature([p.replace(annotation=written(hints[p.name], taken=True)) if p.name in hints else p for p in own])


@dataclass(frozen=True, kw_only=True)
class Spec(metaclass=SpecType):
    """Base of every method's recipe.

    Args:
        targets: role names, "all-linear", module-name suffixes, globs or a regex on full paths (see `core.targets`).
        layers: "last:4", "first:2", "0,2-5", or block numbers ([0, 2], range(4)): only these blocks of each stack of layers.
        exclude: patterns, like `targets`, of modules to leave alone.
        train_modules: patterns of modules trained in full beside the op, kept as a delta to the base. "auto": the head of a model that
            classifies (see `core.task_head`), and nothing on any other; () or None: nothing at all.
    """

    method: ClassVar[str] = ""
    port: ClassVar[str] = "weight"
    optional: ClassVar[bool] = False  # as a part of another recipe: whether it may find no place for itself

    targets: str | tuple[str, ...] = "all-linear"
    layers: Annotated[str | None, Reads(blocks, "str | int | Iterable[int] | None")] = None
    exclude: Annotated[str | tuple[str, ...], Reads(none_as_empty, "str | Iterable[str] | None")] = ()
    train_modules: Annotated[str | tuple[str, ...], Reads(none_as_empty, "str | Iterable[str] | None")] = AUTO

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__hash__" not in vars(cls):
            cls.__hash__ = Spec.__hash__  # type: ignore[method-assign]  # the one that `dataclass` would make fails for options that are mappings

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, f.name)) for f in dataclasses.fields(self))))

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
        if not self.train_modules or self.train_modules == AUTO:
            return (self,)
        from slimtune.methods.dense import Dense

        return (self, Dense(targets=self.train_modules))

    def with_heads(self, heads: tuple[str, ...]) -> Spec:
        """Return this spec with the heads of a model in place of "auto"."""
        return dataclasses.replace(self, train_modules=heads) if self.train_modules == AUTO else self

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
        options = {k: v for k, v in data.items() if k != "method"}
        names, hints = [f.name for f in dataclasses.fields(cls)], hints_of(cls)
        wrong = [f"{k!r} is not an option of {data['method']}; closest: {closest(k, names)}" for k in options if k not in names]
        values = {k: read(v, hints[k]) for k, v in options.items() if k in names}
        wrong += [p for k, v in values.items() if (p := problem(k, v, hints[k]))]
        if wrong:
            raise SpecError("; ".join(wrong), where=f"method {data['method']}", hint=f"options: {', '.join(names)}")
        spec = cls(**values)
        spec.validate()
        return spec

    def validate(self) -> None:
        """Raise if any hyper-parameter has a wrong type or value, naming all of them.

        Raises:
            SpecError: with every problem.
        """
        hints = hints_of(type(self))
        wrong = [p for name, hint in hints.items() if (p := problem(name, getattr(self, name), hint))]
        wrong = wrong or self.problems()
        if wrong:
            raise SpecError("; ".join(wrong), where=f"{type(self).__name__}(...)", hint=self._as_an_example(wrong))

    def _as_an_example(self, wrong: list[str]) -> str:
        """Return the defaults of the options that these problems begin with, as one types them."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        words = [word for text in wrong for word in (*re.findall(r"^\w+", text), *re.findall(r"\w+(?==)", text))]
        named = list(dict.fromkeys(word for word in words if word in fields)) or list(fields)[-1:]
        shown = [f"{name}={_written(default_of(fields[name]))}" for name in named]
        hints = hints_of(type(self))
        types = "; ".join(f"{name} takes {written(hints[name], taken=True)}" for name in named)
        return f"{', '.join(shown)} {'is' if len(shown) == 1 else 'are'} the default; {types}"


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
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return frozenset((k, _hashable(v)) for k, v in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (tuple, list)) else value
