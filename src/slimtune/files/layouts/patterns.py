"""Target patterns in two languages: ours (see `core.targets`) and the reference's.

    reference list entry t   the path is t or ends with ".t"          ours: t, or re:(.*\\.)?t where t means something else here
    reference text           regex that matches the whole path         ours: re:...
    reference rank pattern k regex: (.*\\.)?(k) matches the whole path  ours: re:(.*\\.)?(k)

Writing goes from facts, not from patterns: the paths that really carry ops are known, and the shortest form that gives just these is
taken: last names; last names in chosen layers; endings of paths; one regex.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from slimtune.core.targets import GROUPS, KINDS, ROLES

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # where the reference looks for a layer's number


def from_suffix(entry: str) -> str:
    """Translate an entry of a reference list."""
    words = {*ROLES, *GROUPS, *KINDS, "head"}
    return entry if _PLAIN.fullmatch(entry) and entry not in words else rf"re:(.*\.)?{re.escape(entry)}"


def from_targets(value: str | list[str]) -> str | tuple[str, ...]:
    """Translate `target_modules` or `exclude_modules`."""
    if isinstance(value, str):
        return value if value == "all-linear" else f"re:{value}"
    return tuple(from_suffix(v) for v in value)


def from_key(key: str) -> str:
    """Translate a key of `rank_pattern` or `alpha_pattern`."""
    return rf"re:(.*\.)?({key})"


def named_by(value: str | Collection[str], paths: Iterable[str]) -> set[str]:
    """Return the paths that a reference list or text names."""
    if isinstance(value, str):
        compiled = re.compile(value)
        return {p for p in paths if compiled.fullmatch(p)}
    wanted = set(value)
    return {p for p in paths if any(end in wanted for end in _ends(p))}


def layer_number(path: str) -> int | None:
    """Return the number the reference takes for the layer of a path."""
    found = _LAYER.match(path)
    return int(found[1]) if found else None


def to_targets(wanted: Collection[str], paths: Collection[str], layers: bool = True) -> dict[str, Any]:
    """Return `target_modules` and, if `layers`, `layers_to_transform` that name just the `wanted` among the `paths` of all modules."""
    wanted, short = set(wanted), sorted({p.rpartition(".")[2] for p in wanted})
    named = named_by(short, paths)
    if named == wanted:
        return {"target_modules": short}
    numbers = {layer_number(p) for p in wanted}
    if layers and None not in numbers and {p for p in named if layer_number(p) in numbers} == wanted:
        return {"target_modules": short, "layers_to_transform": sorted(n for n in numbers if n is not None)}
    every, ours = (Counter(end for p in group for end in _ends(p)) for group in (paths, wanted))
    minimal = {next((end for end in _ends(p) if every[end] == ours[end]), "") for p in wanted}  # the shortest that names no other path
    if "" not in minimal:
        return {"target_modules": sorted(minimal)}
    return {"target_modules": "|".join(re.escape(p) for p in sorted(wanted))}


def to_pattern(values: Mapping[str, float], default: float) -> dict[str, Any]:
    """Return a `rank_pattern` or `alpha_pattern` that gives each path its value.

    Args:
        values: path -> value.
        default: the value for paths without a pattern.
    """
    by_last: dict[str, set[float]] = {}
    for path, v in values.items():
        by_last.setdefault(path.rpartition(".")[2], set()).add(v)
    out: dict[str, Any] = {}
    for path, v in sorted(values.items()):
        last = path.rpartition(".")[2]
        if by_last[last] == {v} and v != default and path != last:
            out[re.escape(last)] = v
        elif v != default:
            out[f"^{re.escape(path)}"] = v
    return out


def shortest(path: str, paths: Collection[str]) -> str | None:
    """Return the shortest ending of a path that no other path ends with, letter by letter; None if there is none."""
    for end in _ends(path):
        if [p for p in paths if p.endswith(end)] == [path]:
            return end
    return None


def _ends(path: str) -> list[str]:
    """Return every ending of a path made of whole names, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
