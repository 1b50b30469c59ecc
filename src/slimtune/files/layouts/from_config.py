"""A config object of the reference (`peft.LoraConfig(...)`, as its `to_dict` gives it) as a spec, by the same translation that reads its files.

What the reference does and this library does not, or does under another verb, is refused by the field's name. What means something else is
noted for the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from slimtune.core.errors import FormatError, SpecError
from slimtune.core.reference_names import ELSEWHERE
from slimtune.core.spec import AUTO, Spec
from slimtune.core.spec_hints import BESIDE, PLACES, typed, union_of
from slimtune.files.layouts.config import check_config
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.prefix import PrefixLayout
from slimtune.files.layouts.prompt import PromptLayout
from slimtune.files.layouts.reading import where_to
from slimtune.files.layouts.reference import HEADS
from slimtune.files.layouts.registry import layout_of
from slimtune.methods.p_tuning import PTuning
from slimtune.methods.prefix_tuning import PrefixTuning

# How the reference starts -> how it is called here; True is its usual start everywhere.
STARTS: dict[str, dict[Any, str]] = {
    "init_lora_weights": {
        True: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora", "corda": "corda", "eva": "eva",
        "lora_ga": "lora_ga",
    },
    "prompt_tuning_init": {"RANDOM": "random", "SAMPLE_VOCAB": "vocab", "TEXT": "text"},
    "init_weights": {True: "", None: ""},
    "init_ia3_weights": {True: ""},
}  # fmt: skip
# Fields that a file of the reference may hold without a meaning for its reader, and that mean something in a config for training.
MEANS_MORE = ("layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "target_parameters")


# Fields that the reference fills in from the model.
OF_THE_MODEL = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size")


def spec_from_config(config: dict[str, Any]) -> tuple[Spec, list[str]]:
    """Return the spec that a config means, and notes on what differs.

    Args:
        config: `to_dict` of a config object of the reference.

    Raises:
        SpecError: it asks for something that has another form here, or none; every such field is named.
    """
    config = {key: _json(value) for key, value in config.items()}
    named = config.get("encoder_hidden_size")
    config |= {key: 1 for key in OF_THE_MODEL if key in config and config[key] is None}
    kind = str(config.get("peft_type"))
    where = f"a config of type {kind}"
    try:
        layout = layout_of(kind, Path(kind))
        check_config(config, Path(kind), frozenset(), layout.fields)  # type: ignore[attr-defined]
    except FormatError as error:
        raise SpecError(error.what.replace("adapter_config.json", "the config"), where=where, hint=error.hint) from None
    if beside := {name: config[name] for name in BESIDE if config.get(name) not in (None, [], {}, "none")}:
        spec = _recipe(layout, {**config, **dict.fromkeys(beside), "bias": "none"})
        spec = _with(spec, **({"targets": type(spec).targets} if config.get("target_modules") is None else {}), train_modules=_trained(config))
        places = {name: getattr(spec, name) for name in PLACES}
        union = union_of(typed(spec), places, beside)
    if wrong := {**_refused(config), **({", ".join(beside): union} if beside else {})}:
        raise SpecError("this has another form here: " + ", ".join(wrong), where=where, hint="; ".join(f"{k}: {wrong[k]}" for k in wrong))
    notes: list[str] = []
    spec = _recipe(layout, config)
    if isinstance(spec, PTuning):
        spec = _with(spec, hidden=named)
    if "target_modules" in config and config["target_modules"] is None and type(spec).targets:
        spec = _with(spec, targets=type(spec).targets)
        notes.append(f"the config names no target_modules: targets={type(spec).targets!r}, where the reference has a list for each kind of model")
    spec = _with(spec, train_modules=_trained(config), **_start(config))
    spec.validate()
    return spec, [f"the config means {spec}", *notes]


def _json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _refused(config: dict[str, Any]) -> dict[str, str]:
    """Return field -> what to write here, of fields that mean something when training begins."""
    asked = {name: ELSEWHERE[name] for name in MEANS_MORE if config.get(name)}
    if config.get("prefix_projection") and config["encoder_hidden_size"] == 1:
        asked["prefix_projection"] = "name encoder_hidden_size, too: st.PrefixTuning(hidden=512)"
    for name, starts in STARTS.items():
        if name in config and not any(type(s) is type(config[name]) and s == config[name] for s in starts):
            asked[f"{name}={config[name]!r}"] = f"one of {', '.join(map(str, starts))}"
    return asked


def _recipe(layout: Any, config: dict[str, Any]) -> Spec:
    if isinstance(layout, ModularLayout):
        return layout.recipe(config, [], cast(Any, None))  # without places of ops: the config alone
    if isinstance(layout, PrefixLayout):
        return PrefixTuning(p=config["num_virtual_tokens"], hidden=config["encoder_hidden_size"] if config["prefix_projection"] else 0)
    assert isinstance(layout, PromptLayout)
    return layout.recipe(config, tokens=config["num_virtual_tokens"])


def _start(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say how training begins."""
    out: dict[str, Any] = {}
    if config.get("init_lora_weights") is not None:
        out["init"] = STARTS["init_lora_weights"][config["init_lora_weights"]]
    if config.get("prompt_tuning_init") is not None:
        out["init"] = STARTS["prompt_tuning_init"][config["prompt_tuning_init"]]
        if out["init"] == "text":
            out |= {"init_text": config["prompt_tuning_init_text"], "tokenizer": config["tokenizer_name_or_path"]}
    return out


def _trained(config: dict[str, Any]) -> Any:
    named = where_to({"target_modules": None, **config})["train_modules"]
    if not named:
        return AUTO
    return (*named, "maybe:head") if config.get("task_type") in HEADS else named  # which the reference trains under these tasks, too


def _with(spec: Spec, **options: Any) -> Spec:
    """Return a spec with other options, inside of what it is put around where only that has them."""
    own = {f.name for f in fields(spec)}
    inner = {k: v for k, v in options.items() if k not in own}
    changed: Callable[..., Any] = replace
    outer = changed(spec, **{k: v for k, v in options.items() if k in own})
    of = getattr(outer, "of", None)
    fits = {k: v for k, v in inner.items() if isinstance(of, Spec) and k in {f.name for f in fields(of)}}
    return changed(outer, of=_with(of, **fits)) if isinstance(of, Spec) and fits else outer
