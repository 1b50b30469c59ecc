"""Options: what the type of a spec's field says about its values, read with `typing.get_type_hints` once per class.

Understood: None, bool, int, float (takes an int, no NaN, no infinity), str, Path, Any, Literal, enums, unions and Optional, list[...],
tuple[...], Sequence[...], dict[...], `Spec` and its subclasses, and `Annotated[..., Reads(...)]`. Anything else cannot be kept in a file, and
is an error where the method is registered.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from slimtune.core.errors import SpecError

SIMPLE: dict[Any, str] = {type(None): "None", bool: "bool", int: "int", float: "float", str: "str", Path: "Path", Any: "Any"}
_LISTS = (list, Sequence, Iterable, Collection)


class Unfit(Exception):
    """A value is not of its option's type; the text says what it must be where the type alone does not."""


@dataclasses.dataclass(frozen=True)
class Reads:
    """How an option reads what its type does not name, inside `Annotated`.

    Args:
        turn: value -> value of the option's type; raises `Unfit`.
        takes: the type that people may write, for completion.
    """

    turn: Callable[[Any], Any]
    takes: str


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return option -> type of a spec class.

    Raises:
        SpecError: a type cannot be read, or is not one that options may have.
    """
    where = f"{cls.__module__}.{cls.__qualname__}"
    try:
        found = typing.get_type_hints(cls, include_extras=True)
    except Exception as error:  # whatever the annotations of a foreign module raise when they are evaluated
        raise SpecError(
            f"the types of the options of {cls.__name__} cannot be read: {error}", where=where, hint="import what they name at the top of its module"
        ) from None
    hints = {f.name: found[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    odd = [f"{name}: {written(hint)}" for name, hint in hints.items() if not understood(hint)]
    if odd:
        raise SpecError(
            f"options of these types cannot be checked and kept in a file: {', '.join(odd)}",
            where=where,
            hint="bool, int, float, str, Path, Literal, Optional, unions, tuple[...], list[...], dict[...] and Spec can",
        )
    return hints


def understood(hint: Any) -> bool:
    """Tell whether `fit` knows a type."""
    if hint is None or hint in SIMPLE:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return understood(args[0])
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, dict, Mapping, tuple, *_LISTS):
        return all(arg is Ellipsis or understood(arg) for arg in args)
    return hint in (tuple, list, dict) or is_spec(hint) or (isinstance(hint, type) and issubclass(hint, enum.Enum))


def is_spec(hint: Any) -> bool:
    from slimtune.core.spec import Spec

    return isinstance(hint, type) and issubclass(hint, Spec)


def read(value: Any, hint: Any) -> Any:
    """Return a value as an option of this type holds it, or as it is if it cannot be one: `problem` says so then.

    Raises:
        SpecError: a spec inside it is wrong.
    """
    try:
        return fit(value, hint)
    except Unfit:
        return value


def problem(name: str, value: Any, hint: Any) -> str:
    """Return what is wrong with the type of an option's value, or ""."""
    try:
        fit(value, hint)
    except Unfit as error:
        return f"{name} must be {str(error) or written(hint)}, not {value!r}"
    return ""


def fit(value: Any, hint: Any) -> Any:
    """Return a value as a type wants it: lists, sets and ranges as tuples, mappings with a "method", names and classes as specs.

    Raises:
        Unfit: it is not of that type.
        SpecError: a spec inside it is wrong.
    """
    if hint is Any:
        return value
    if hint in SIMPLE or hint is None:
        return _simple(value, hint)
    if is_spec(hint):
        return _spec(value, hint)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Annotated:
        for extra in args[1:]:
            value = extra.turn(value) if isinstance(extra, Reads) else value
        return fit(value, args[0])
    if origin in (Union, types.UnionType):
        return _one_of(value, args)
    if origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return value
        raise Unfit
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise Unfit
        key, item = args or (Any, Any)
        return {fit(k, key): fit(v, item) for k, v in value.items()}
    if origin is tuple or origin in _LISTS:
        return _row(value, origin, args)
    try:
        return hint(value)  # an enum: a member of it, or a member's value
    except (ValueError, TypeError):
        raise Unfit from None


def _simple(value: Any, hint: Any) -> Any:
    if hint is None or hint is type(None):
        fine = value is None
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # NumPy's, too: those cannot be kept in JSON
    elif hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise Unfit("a finite number")
        return value if isinstance(value, (int, float)) and type(value) in (int, float) else float(value)
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    else:
        fine = isinstance(value, hint) and hint not in (int, float)
    if not fine:
        raise Unfit
    return value


def _spec(value: Any, hint: Any) -> Any:
    from slimtune.core.spec import Spec

    if isinstance(value, type) and issubclass(value, Spec):
        value = value()
    elif isinstance(value, str):
        value = Spec.from_dict({"method": value})
    elif isinstance(value, Mapping) and isinstance(value.get("method"), str):
        value = Spec.from_dict(dict(value))
    if not isinstance(value, hint):
        raise Unfit
    return value


def _one_of(value: Any, hints: Sequence[Any]) -> Any:
    """Return what the first type makes of a value, or rather the first that takes it as it is."""
    found: list[Any] = []
    said = ""
    for hint in hints:
        try:
            found.append(fit(value, hint))
        except Unfit as error:
            said = said or str(error)
    if not found:
        raise Unfit(said)
    return next((f for f in found if type(f) is type(value)), found[0])


def _row(value: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise Unfit
    if isinstance(value, (set, frozenset)):  # in an order that is the same in every process
        value = sorted(value, key=lambda v: (type(v).__name__, v if isinstance(v, (int, float, str)) else repr(v)))
    items = list(value)
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(items) != len(args):
            raise Unfit
        return tuple(fit(v, hint) for v, hint in zip(items, args, strict=True))
    items = [fit(v, args[0]) for v in items] if args else items
    return items if origin is list else tuple(items)


def choices(hint: Any) -> list[Any]:
    """Return the plain types that a type is made of at its top: of a union its members, of tuple[int, ...] `tuple`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return choices(args[0])
    if origin in (Union, types.UnionType):
        return [kind for arg in args for kind in choices(arg)]
    if origin is Literal:
        return [type(arg) for arg in args]
    return [origin or hint]


def written(hint: Any, *, taken: bool = False) -> str:
    """Return a type as one writes it.

    Args:
        taken: with all that may be given for it, as in a signature.
    """
    if hint is None or hint in SIMPLE:
        return "None" if hint is None else "float" if hint is float else "str | Path" if taken and hint is Path else SIMPLE[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        wide = next((a.takes for a in args[1:] if isinstance(a, Reads)), None)
        return wide if taken and wide is not None else written(args[0], taken=taken)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(written(a, taken=taken) for a in args))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, args))}]"
    if taken and is_spec(hint):
        return "Spec | type[Spec] | str"
    if origin is None:
        return hint.__name__ if isinstance(hint, type) else str(hint)
    inner = ", ".join("..." if a is Ellipsis else written(a, taken=taken) for a in args)
    if taken and (origin in _LISTS or (origin is tuple and args[-1] is Ellipsis)):
        return f"Iterable[{written(args[0], taken=True)}]"
    if taken and origin in (dict, Mapping):
        return f"Mapping[{inner}]"
    return f"{origin.__name__}[{inner}]"


# ---- options that every method has ----------------------------------------------------------------------------------
def blocks(value: Any) -> Any:
    """Turn block numbers into the text that `layers` keeps: 3 -> "3", range(4) -> "0-3", [0, 2, 3] -> "0,2-3".

    Raises:
        Unfit: a number counts from the end, or there is none.
    """
    if value is None or isinstance(value, (str, bool, Mapping)):
        return value
    numbers_: list[Any] = [value] if isinstance(value, numbers.Integral) else list(value) if isinstance(value, Iterable) else [None]
    if not numbers_ or any(isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 0 for n in numbers_):
        raise Unfit('block numbers from 0, such as [0, 2], range(4), "0,2-5", "first:2" or "last:4"')
    runs: list[list[int]] = []
    for n in sorted({int(n) for n in numbers_}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def none_as_empty(value: Any) -> Any:
    return () if value is None else value
