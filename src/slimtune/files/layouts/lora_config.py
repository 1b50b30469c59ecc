"""The reference's LoRA config: every field, its default, and which of them slimtune carries out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.core.errors import FormatError
from slimtune.files.layouts.config import (
    FLAG,
    NUMBER,
    RANK,
    SHARE,
    TARGETS,
    Fields,
    biases,
    check_config,
    is_mapping,
    is_number,
    is_texts,
)

DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "monteclora_config": None, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "target_modules": None,
    "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "velora_config": None,
}  # fmt: skip
# Inits after which the file is relative to a base that the reference changed: such a file needs the same change of the base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "kaiming")


def _token_lists(v: Any) -> bool:
    lists = list(v.values()) if isinstance(v, dict) and all(isinstance(k, str) for k in v) else [v]
    return v is None or all(isinstance(t, list) and t and all(type(i) is int and 0 <= i < 2**31 for i in t) for t in lists)


FIELDS = Fields(
    DEFAULTS,
    free=frozenset({"corda_config", "eva_config", "fan_in_fan_out", "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core"}),
    types={
        **TARGETS,
        "r": RANK,
        "lora_alpha": NUMBER,
        "lora_dropout": SHARE,
        "use_rslora": FLAG,
        "use_dora": FLAG,
        "use_qalora": FLAG,
        "qalora_group_size": RANK,
        "lora_bias": FLAG,
        "bias": biases("lora_only"),
        "target_parameters": ("a list of names", lambda v: v is None or is_texts(v)),
        "rank_pattern": ("a mapping pattern -> rank", lambda v: is_mapping(v) and all(type(i) is int and 1 <= i < 2**24 for i in v.values())),
        "alpha_pattern": ("a mapping pattern -> number", lambda v: is_mapping(v) and all(map(is_number, v.values()))),
        "trainable_token_indices": ("a list of token numbers, or a mapping module -> such a list", _token_lists),
        "ensure_weight_tying": FLAG,
    },
)


def check_lora(config: dict[str, Any], path: Path, relax: frozenset[str]) -> None:
    """As `config.check_config`, and refuse starts that changed the base.

    Raises:
        FormatError: naming every field that cannot be carried out.
    """
    check_config(config, path, relax, FIELDS)
    if config["use_dora"] and config["use_qalora"]:
        raise FormatError("adapter_config.json is wrong: use_dora and use_qalora exclude each other", where=str(path.parent))
    init = config["init_lora_weights"]
    if init not in _PLAIN_INITS:
        raise FormatError(
            f"the adapter uses what slimtune does not do: init_lora_weights={str(init)[:60]!r}",
            where=str(path.parent),
            hint="the file holds a change to a changed base: save it as a plain LoRA there (path_initial_model_for_weight_conversion)",
        )
