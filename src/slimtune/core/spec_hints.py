"""What to type instead of a call of a spec class that cannot be read: every hint is the whole call, with what was given in it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from slimtune.core.errors import SpecError, closest
from slimtune.core.options import Unfit, fit, hints_of, is_spec
from slimtune.core.reference_names import ELSEWHERE, known_as

PLACES = ("targets", "layers", "exclude")
BESIDE = ("bias", "trainable_token_indices")  # options elsewhere of what is a method of its own here, beside the first in a union


def unknown_options(cls: Any, unknown: Iterable[str], given: dict[str, Any]) -> SpecError:
    """Return the error for names that are no options of a spec class: what they are called here, or the closest."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = list(unknown)
    hints, beside, inner = [], {}, {}
    inside = {f.name for f in dataclasses.fields(around)} if (around := _inner(fields)) is not None else set()
    for name in unknown:
        own = known_as(name, fields)
        if not own and (deeper := name if name in inside else known_as(name, inside)):
            inner[deeper] = given[name]
        elif own:
            hints.append(f"{own}={_shown(given[name])} for {name}=")
        elif name in BESIDE:
            beside[name] = given[name]
        else:
            hints.append(f"{name}: {ELSEWHERE[name]}" if name in ELSEWHERE else f"closest to {name}: {closest(name, fields)}")
    if inner:
        hints.append(f"of={_call(type(around), inner)}: the options of what {cls.__name__} is put around are given there")
    if beside:
        known = {own: v for k, v in given.items() if (own := k if k in fields else known_as(k, fields))}
        hints.append(union_of(_call(cls, known), {"targets": getattr(cls, "targets", "all-linear"), **known}, beside))
    names = ", ".join(map(repr, unknown))
    return SpecError(f"{cls.__name__} has no option {names}", where=f"{cls.__name__}(...)", hint="; ".join(hints))


def options_by_name(cls: Any, args: tuple[Any, ...]) -> SpecError:
    """Return the error for options without names: with the names that such values may have been meant for."""
    hints = hints_of(cls)
    bases: list[Any] = [b for b in cls.__mro__[1:] if dataclasses.is_dataclass(b)]
    base = [name for name in hints if all(name in hints_of(b) for b in bases)]
    own = [name for name in hints if name not in base]
    if "of" in hints and not is_spec(hints["of"]) and all(_is_spec(value) for value in args):
        return _by_name(cls, args, f"of=[{', '.join(map(_spec, args))}]")
    left, written = set(hints), []
    for value in args:
        words = isinstance(value, (str, list, tuple, set))
        order = ["of", *base, *own] if words and not _is_spec(value) else [*own, *base]
        name = next((n for n in order if n in left and _fits(value, hints[n])), None)
        if name is None or hints[name] is Any:
            return _by_name(cls, args, f"{next(iter(left & set(own or base)), 'targets')}=...")
        left.discard(name)
        written.append(f"{name}={_spec(value) if _is_spec(value) else _shown(value)}")
    return _by_name(cls, args, ", ".join(written))


def union_of(call: str, places: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """Return the union that does what options of the reference did in one config.

    Args:
        call: the first member, as typed.
        places: its targets, layers and exclude; biases train at the same.
        beside: option of the reference -> its value.
    """
    members, said = [call], []
    if (bias := beside.get("bias", "none")) != "none":
        at = ", ".join(f"{k}={_shown(places[k])}" for k in PLACES if places.get(k)) if bias != "all" else ""
        members.append(f"st.BitFit({at})")
        said.append("biases")
    elif "bias" in beside:
        said.append("leave bias= out: no bias trains beside a method unless it is asked for")
    tokens = beside.get("trainable_token_indices")
    if isinstance(tokens, Mapping):
        members += [f"st.TrainableTokens(targets={name!r}, tokens={list(numbers)})" for name, numbers in tokens.items()]
    elif tokens:
        members.append(f"st.TrainableTokens(tokens={list(tokens) if isinstance(tokens, Iterable) else tokens})")
    said += ["tokens"] if tokens else []
    if len(members) == 1:
        return "; ".join(said) or "leave it out"
    return f"{' and '.join(said)} train beside a method in a union: st.Union(of=({', '.join(members)}))"


def typed(spec: Any) -> str:
    """Return a spec as one types it after `import slimtune as st`."""
    return re.sub(r"(?<![\w.'\"])([A-Z]\w*)\(", r"st.\1(", str(spec))


def _inner(fields: dict[str, Any]) -> Any:
    """Return the spec that a method of this kind is put around by default, or None."""
    of = fields.get("of")
    if of is None or of.default_factory is dataclasses.MISSING:
        return of.default if of is not None and dataclasses.is_dataclass(of.default) else None
    made = of.default_factory()
    return made if dataclasses.is_dataclass(made) else None


def _call(cls: type, options: Mapping[str, Any]) -> str:
    return f"st.{cls.__name__}({', '.join(f'{k}={_shown(v)}' for k, v in options.items())})"


def _shown(value: Any) -> str:
    if _is_spec(value):
        return _spec(value)
    return repr(value) if len(repr(value)) < 200 else "..."


def _is_spec(value: Any) -> bool:
    from slimtune.core.spec import Spec

    return isinstance(value, Spec) or (isinstance(value, type) and issubclass(value, Spec))


def _spec(value: Any) -> str:
    return f"st.{value.__name__}()" if isinstance(value, type) else typed(value)


def _fits(value: Any, hint: Any) -> bool:
    try:
        fit(value, hint)
    except (Unfit, SpecError):
        return False
    return True


def _by_name(cls: type, args: tuple[Any, ...], call: str) -> SpecError:
    given = ", ".join(_spec(a) if _is_spec(a) else f"{a!r:.80}" for a in args)
    return SpecError(f"options are given by name, not {given:.160}", where=f"{cls.__name__}(...)", hint=f"{cls.__name__}({call})")
