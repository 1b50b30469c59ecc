"""The registry: one decorator makes a spec a method; names, tables, docs, files and tests read it from here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from slimtune.core.errors import SpecError, closest
from slimtune.core.options import hints_of
from slimtune.core.spec import Spec

S = TypeVar("S", bound=type[Spec])
_SPECS: dict[str, type[Spec]] = {}


def register(name: str) -> Callable[[S], S]:
    """Register a Spec subclass as method `name` (lower case; third parties use the same decorator).

    Raises:
        SpecError: the name is taken by another class, or the type of an option cannot be checked (see `core.options`).
    """

    def wrap(cls: S) -> S:
        known = _SPECS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SpecError(f"method {name!r} is registered already, by {known.__module__}.{known.__qualname__}", hint="choose another name")
        hints_of(cls)
        cls.method = name
        _SPECS[name] = cls
        return cls

    return wrap


def methods() -> dict[str, type[Spec]]:
    """Return every registered method: name -> spec class, in alphabetical order."""
    _load_own()
    return dict(sorted(_SPECS.items()))


def spec_class(name: str) -> type[Spec]:
    """Return the spec class of a method.

    Raises:
        SpecError: no such method, with the closest names.
    """
    _load_own()
    if name not in _SPECS:
        raise SpecError(f"no method is called {name!r}", hint=f"closest: {closest(name, _SPECS)}; all: {', '.join(sorted(_SPECS))}")
    return _SPECS[name]


def _load_own() -> None:
    package = importlib.import_module("slimtune.methods")  # the attribute slimtune.methods is the public function
    for info in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"slimtune.methods.{info.name}")
