"""The config of a method of the reference library: which fields there are, their defaults, and which values slimtune carries out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimtune.core.errors import FormatError, closest

COMMON: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "peft_type": None, "peft_version": None, "revision": None,
    "task_type": None,
}  # fmt: skip
Check = tuple[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class Fields:
    """The fields of one config.

    Attributes:
        defaults: every field of the reference's config class but the common ones, and its default.
        free: those that may have any value: they only describe the file, or how training began.
        types: field -> (words, test): those that are carried out. One that is neither here nor free must keep its default.
    """

    defaults: dict[str, Any]
    free: frozenset[str] = frozenset()
    types: dict[str, Check] = field(default_factory=dict)

    def all(self, peft_type: str) -> dict[str, Any]:
        """Return a whole config with its defaults."""
        return {**COMMON, **self.defaults, "peft_type": peft_type}


def check_config(config: dict[str, Any], path: Path, relax: frozenset[str], fields: Fields) -> None:
    """Fill in defaults, in place, and raise for anything that cannot be carried out.

    Raises:
        FormatError: naming every such field.
    """
    known = {*COMMON, *fields.defaults, "runtime_config"}
    unknown = [k for k, v in config.items() if k not in known and v not in (None, False, {}, [])]
    if unknown and "config" not in relax:
        k = unknown[0]
        raise FormatError(
            f"adapter_config.json has fields that slimtune does not know: {', '.join(map(repr, unknown[:6]))}",
            where=str(path.parent),
            hint=f"closest to {k!r}: {closest(k, known, 1)}; to ignore them: st.load(..., relax='config')",
        )
    for key, value in {**COMMON, **fields.defaults}.items():
        if config.get(key) is None:
            config[key] = value if not isinstance(value, (dict, list)) else type(value)(value)
    wrong = [f"{k} must be {what}, not {str(config[k])[:60]!r}" for k, (what, ok) in fields.types.items() if not ok(config[k])]
    if wrong:
        raise FormatError("adapter_config.json is wrong: " + "; ".join(wrong), where=str(path.parent))
    options = [k for k in fields.defaults if k not in fields.types and k not in fields.free]
    asked = [k for k in options if config[k] not in (fields.defaults[k], None, {}, [])]
    if asked:
        what = ", ".join(f"{k}={str(config[k])[:60]!r}" for k in asked)
        raise FormatError(
            f"the adapter uses what slimtune does not do: {what}",
            where=str(path.parent),
            hint="use the library that wrote it, or merge it there into a checkpoint",
        )


# ---- what values are, for `Fields.types` ------------------------------------------------------------------------------
def is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30


def is_texts(v: Any) -> bool:
    return isinstance(v, list) and all(isinstance(t, str) and len(t) < 2000 for t in v)


_ENDLESS = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")  # a repeated group with a repetition in it: may take for ever on a mismatch


def is_regex(v: Any) -> bool:
    if not isinstance(v, str) or len(v) > 100_000 or _ENDLESS.search(v) or max(map(_repeats, v.split("|"))) > 8:
        return False
    try:
        re.compile(v)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _repeats(v: str) -> int:
    return len(re.findall(r"(?<!\\)[*+]", v))


def is_mapping(v: Any) -> bool:
    return isinstance(v, dict) and all(is_regex(k) for k in v)


def is_layers(v: Any) -> bool:
    return v is None or type(v) is int or (isinstance(v, list) and all(type(i) is int for i in v))


_names = "a list of names or a regex"
RANK: Check = ("an integer from 1", lambda v: type(v) is int and 1 <= v < 2**24)
NUMBER: Check = ("a number", is_number)
SHARE: Check = ("a number in [0, 1)", lambda v: is_number(v) and 0 <= v < 1)
FLAG: Check = ("true or false", lambda v: type(v) is bool)
TARGETS: dict[str, Check] = {
    "target_modules": (_names, lambda v: v is None or is_regex(v) or is_texts(v)),
    "exclude_modules": (_names, lambda v: v is None or is_regex(v) or is_texts(v)),
    "modules_to_save": ("a list of names", lambda v: v is None or (is_texts(v) and all(map(is_regex, v)))),
    "layers_to_transform": ("a list of numbers", is_layers),
    "layers_pattern": ("a name or a list of names", lambda v: v is None or is_regex(v) or (is_texts(v) and all(map(is_regex, v)))),
}


def targets(*but: str) -> dict[str, Check]:
    """Return the tests of the fields that say where an adapter goes, without some of them."""
    return {k: v for k, v in TARGETS.items() if k not in but}


def biases(own: str) -> Check:
    """Return the test of the field `bias` of a method whose own biases are called `own`."""
    return f"none, {own} or all", lambda v: v in ("none", own, "all")
