"""The reference's LoRA config: every field, its default, and which of them slimtune carries out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from slimtune.core.errors import FormatError, closest

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": None,
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
    "peft_version": None, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None, "target_modules": None,
    "target_parameters": None, "task_type": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip

# field -> which values it may have ("any": it only describes the file or how training began)
_FREE = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "loftq_config", "eva_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "task_type", "runtime_config",
}  # fmt: skip
# Inits after which the file is relative to a base that the reference changed: such a file needs the same change of the base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "kaiming")

_names = "a list of names or a regex"
_TYPES: dict[str, tuple[str, Any]] = {
    "r": ("an integer from 1", lambda v: type(v) is int and 1 <= v < 2**24),
    "lora_alpha": ("a number", lambda v: _number(v)),
    "lora_dropout": ("a number in [0, 1)", lambda v: _number(v) and 0 <= v < 1),
    "use_rslora": ("true or false", lambda v: type(v) is bool),
    "lora_bias": ("true or false", lambda v: type(v) is bool),
    "bias": ("none, lora_only or all", lambda v: v in ("none", "lora_only", "all")),
    "target_modules": (_names, lambda v: v is None or _regex(v) or _texts(v)),
    "exclude_modules": (_names, lambda v: v is None or _regex(v) or _texts(v)),
    "target_parameters": ("a list of names", lambda v: v is None or _texts(v)),
    "modules_to_save": ("a list of names", lambda v: v is None or (_texts(v) and all(map(_regex, v)))),
    "layers_to_transform": ("a list of numbers", lambda v: v is None or type(v) is int or (isinstance(v, list) and all(type(i) is int for i in v))),
    "layers_pattern": ("a name or a list of names", lambda v: v is None or _regex(v) or (_texts(v) and all(map(_regex, v)))),
    "rank_pattern": ("a mapping pattern -> rank", lambda v: _mapping(v) and all(type(i) is int and 1 <= i < 2**24 for i in v.values())),
    "alpha_pattern": ("a mapping pattern -> number", lambda v: _mapping(v) and all(map(_number, v.values()))),
}


def check_config(config: dict[str, Any], path: Path, relax: frozenset[str]) -> None:
    """Fill in defaults, in place, and raise for anything that cannot be carried out.

    Raises:
        FormatError: naming every such field.
    """
    unknown = [k for k, v in config.items() if k not in DEFAULTS and k not in _FREE and v not in (None, False, {}, [])]
    if unknown and "config" not in relax:
        k = unknown[0]
        raise FormatError(
            f"adapter_config.json has fields that slimtune does not know: {', '.join(map(repr, unknown[:6]))}",
            where=str(path.parent),
            hint=f"closest to {k!r}: {closest(k, DEFAULTS, 1)}; to ignore them: st.load(..., relax='config')",
        )
    for key, value in DEFAULTS.items():
        if config.get(key) is None:
            config[key] = value if not isinstance(value, dict) else {}
    wrong = [f"{k} must be {what}, not {str(config[k])[:60]!r}" for k, (what, ok) in _TYPES.items() if not ok(config[k])]
    if wrong:
        raise FormatError("adapter_config.json is wrong: " + "; ".join(wrong), where=str(path.parent))
    options = [k for k in DEFAULTS if k not in _TYPES and k not in _FREE and k != "init_lora_weights"]
    asked = [k for k in options if config[k] not in (DEFAULTS[k], None, {}, [])]
    init = config["init_lora_weights"]
    if init not in _PLAIN_INITS:
        asked.append("init_lora_weights")
    if asked:
        what = ", ".join(f"{k}={str(config[k])[:60]!r}" for k in asked)
        convert = "the file holds a change to a changed base: save it as a plain LoRA there (path_initial_model_for_weight_conversion)"
        raise FormatError(
            f"the adapter uses what slimtune does not do: {what}",
            where=str(path.parent),
            hint=convert
            if asked == ["init_lora_weights"]
            else "use the library that wrote it, or merge it there into a checkpoint",
        )


def _number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30


def _texts(v: Any) -> bool:
    return isinstance(v, list) and all(isinstance(t, str) and len(t) < 2000 for t in v)


_ENDLESS = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")  # a repeated group with a repetition in it: may take for ever on a mismatch


def _regex(v: Any) -> bool:
    if not isinstance(v, str) or len(v) > 100_000 or _ENDLESS.search(v) or max(map(_repeats, v.split("|"))) > 8:
        return False
    try:
        re.compile(v)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _repeats(v: str) -> int:
    return len(re.findall(r"(?<!\\)[*+]", v))


def _mapping(v: Any) -> bool:
    return isinstance(v, dict) and all(_regex(k) for k in v)
