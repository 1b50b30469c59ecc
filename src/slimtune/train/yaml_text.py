"""Flat YAML with line numbers: YAML 1.2 scalars (so `1e-3` is a number and `no` a word), duplicate keys refused.

PyYAML follows YAML 1.1, where `lr: 1e-3` is text, `label: no` is false and `12:30` is 750. Recipes are typed by people,
so the loader and the dumper here share one small table of scalar patterns, and what is dumped reads back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import yaml

_SCALARS = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Keeps the YAML 1.1 patterns as well, so that what is dumped means the same to every YAML reader."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Double quotes keep line breaks and the like as escapes; the other styles fold them."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _quoted)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(_pattern), _first)
# YAML 1.1 reads a leading zero as octal; people who type `seed: 007` mean seven.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _to_float(str(node.value)))


def _to_float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan"))


class Entry(NamedTuple):
    """One key of a recipe: its value and where it was written ("line 3" or "override lr=1")."""

    value: Any
    place: str


def parse_flat(text: str) -> tuple[dict[str, Entry], list[str]]:
    """Read a flat YAML mapping.

    Args:
        text: the file's content.

    Returns:
        The entries by key, and every problem found (syntax, duplicated keys, keys that are not text).
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return {}, [_syntax(error)]
    except RecursionError:
        return {}, [_TOO_DEEP]
    if node is None:
        return {}, ["the recipe is empty; `slimtune init` lists examples to start from"]
    if not isinstance(node, yaml.MappingNode):
        return {}, [f"line {node.start_mark.line + 1}: a recipe is a list of `key: value` lines, and this is something else"]
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for key_node, value_node in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str) or not key:
            problems.append(f"{line}: a key must be a plain word")
            continue
        if key in entries:
            problems.append(f"{line}: `{key}` is given twice (first on {entries[key].place}); keep one")
            continue
        if too_much := _too_much(value_node):
            problems.append(f"{line}: `{key}`: {too_much}")
            continue
        try:
            value = _construct(value_node)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(f"{line}: `{key}`: {_syntax(error) if isinstance(error, yaml.YAMLError) else error}")
            continue
        entries[key] = Entry(value, line)
    return entries, problems


def parse_override(text: str, texts: Collection[str] = ()) -> tuple[str, Entry] | str:
    """Read one `key=value` from the command line.

    Args:
        text: the argument; its value is a YAML scalar or an inline list.
        texts: keys whose value is text, taken as it is where YAML makes something else of it (`prompt_template=Review: {text}`).

    Returns:
        The key and its entry; or a problem, as text.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"override `{text}`: write key=value, for example lr=1e-3"
    try:
        node = yaml.compose(value, Loader=_Loader)
        if too_much := _too_much(node):
            return f"override `{text[:60]}`: {too_much}"
        read = None if node is None else _construct(node)
    except (yaml.YAMLError, ValueError, RecursionError):
        if key not in texts:
            return f"override `{text}`: the value is not valid YAML; put quotes around it"
        read = value
    if key in texts and read is not None and not isinstance(read, str):
        read = value
    return key, Entry(read, f"override {text}")


def dump_value(value: Any) -> str:
    """Return `value` as inline YAML that reads back to the same value."""
    plain = list(value) if isinstance(value, tuple) else value
    # The short width of PyYAML would fold a long prompt template over several lines.
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


_DEPTH, _VALUES = 20, 10_000  # of one value: a recipe's longest lists have a few dozen entries
_TOO_DEEP = f"lists inside lists more than {_DEPTH} deep are no recipe"


def _too_much(node: yaml.Node | None) -> str:
    """Return what is wrong with a value that is nested too deeply, or too large once its aliases are followed, or ""."""
    sizes: dict[int, int] = {}  # an alias is the same node again: its size is worked out once

    def size(node: yaml.Node | None, depth: int) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if depth > _DEPTH:
            raise RecursionError
        if id(node) not in sizes:
            flat = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in flat)
        return sizes[id(node)]

    try:
        count = size(node, 0)
    except RecursionError:
        return _TOO_DEEP
    return f"it stands for {count:,} values, more than the {_VALUES:,} a recipe may hold" if count > _VALUES else ""


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return f"{line}not valid YAML: {error.problem or error.context}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"not valid YAML: a character that text files do not contain, at position {error.position}"
    return f"not valid YAML: {error}"
