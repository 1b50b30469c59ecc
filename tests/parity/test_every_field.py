"""Every field of the reference's config classes is carried out and compared, refused by name, or known to mean nothing in a file.

A field that a newer version of the reference adds, or a default that it changes, fails `test_the_tables_are_those_of_the_reference`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from pairs import gpt2, llama, mixtral, output, shake, theirs_and_back, zoo

import slimtune as st
from slimtune.files.layouts.registry import LAYOUTS

CLASSES: dict[str, Any] = {
    "LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig, "IA3": peft.IA3Config, "LN_TUNING": peft.LNTuningConfig,
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig, "PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig, "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
}  # fmt: skip
NEEDED = {"ADALORA": {"total_step": 100}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda cls: cls.peft_type)
def test_the_tables_are_those_of_the_reference(layout: Any) -> None:
    fresh = CLASSES[layout.peft_type](**NEEDED.get(layout.peft_type, {}))
    theirs = {f.name: f for f in dataclasses.fields(fresh)}
    ours = layout.fields.all(layout.peft_type)
    assert set(theirs) - {"runtime_config"} == set(ours)  # that one is dropped when the reference saves
    for name, f in theirs.items():
        if name not in {"runtime_config", "inference_mode", "peft_type"}:
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
            assert ours[name] == default, name


# field -> (model, other options, value): carried out, and compared both ways
LORA = {"r": 4, "target_modules": ["q_proj"]}
DONE: dict[str, dict[str, Any]] = {
    "LORA": {
        "alpha_pattern": (llama, LORA, {"layers.1.*q_proj": 3}),
        "bias": (gpt2, {"target_modules": ["c_attn"]}, "all"),
        "ensure_weight_tying": (llama, {**LORA, "trainable_token_indices": [1]}, True),
        "exclude_modules": (llama, LORA, r".*layers\.1.*"),
        "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"]}, True),
        "inference_mode": (llama, LORA, False),
        "init_lora_weights": (llama, LORA, "gaussian"),
        "layers_pattern": (llama, {**LORA, "layers_to_transform": [1]}, "layers"),
        "layers_to_transform": (llama, LORA, 2),
        "lora_alpha": (llama, LORA, 5),
        "lora_bias": (llama, LORA, True),
        "lora_dropout": (llama, LORA, 0.5),
        "modules_to_save": (llama, LORA, ["lm_head", "norm"]),
        "qalora_group_size": (llama, {**LORA, "use_qalora": True}, 8),
        "r": (llama, {"target_modules": ["q_proj"]}, 3),
        "rank_pattern": (llama, LORA, {"^model.layers.0.self_attn.q_proj": 2}),
        "target_modules": (llama, {"r": 4}, ["layers.0.mlp.up_proj", "k_proj"]),
        "target_parameters": (mixtral, {"r": 4, "target_modules": []}, ["experts.gate_up_proj"]),
        "task_type": (llama, LORA, "CAUSAL_LM"),
        "trainable_token_indices": (llama, LORA, {"embed_tokens": [5, 2]}),
        "use_dora": (llama, LORA, True),
        "use_qalora": (llama, LORA, True),
        "use_rslora": (llama, LORA, True),
    },
    "VERA": {
        "bias": (gpt2, {"target_modules": ["c_attn"]}, "vera_only"),
        "d_initial": (llama, {"target_modules": ["q_proj"]}, 0.7),
        "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"]}, True),
        "inference_mode": (llama, {"target_modules": ["q_proj"]}, False),
        "init_weights": (llama, {"target_modules": ["q_proj"]}, False),
        "layers_pattern": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}, "layers"),
        "layers_to_transform": (llama, {"target_modules": ["q_proj"]}, [0, 1]),
        "modules_to_save": (llama, {"target_modules": ["q_proj"]}, ["norm"]),
        "projection_prng_key": (llama, {"target_modules": ["q_proj"]}, 11),
        "r": (llama, {"target_modules": ["q_proj"]}, 5),
        "save_projection": (llama, {"target_modules": ["q_proj"]}, False),
        "target_modules": (llama, {}, ["q_proj", "down_proj"]),
        "task_type": (llama, {"target_modules": ["q_proj"]}, "CAUSAL_LM"),
        "vera_dropout": (llama, {"target_modules": ["q_proj"]}, 0.5),
    },
    "IA3": {
        "exclude_modules": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}, ["layers.1.self_attn.k_proj"]),
        "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"], "feedforward_modules": []}, True),
        "feedforward_modules": (llama, {"target_modules": ["k_proj", "down_proj"]}, ["down_proj"]),
        "inference_mode": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}, False),
        "init_ia3_weights": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}, False),
        "modules_to_save": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}, ["norm"]),
        "target_modules": (llama, {"feedforward_modules": []}, "all-linear"),
        "task_type": (llama, {"target_modules": ["k_proj"], "feedforward_modules": []}, "CAUSAL_LM"),
    },
    "LN_TUNING": {
        "exclude_modules": (llama, {"target_modules": ["input_layernorm"]}, ["layers.1.input_layernorm"]),
        "inference_mode": (llama, {"target_modules": ["norm"]}, False),
        "modules_to_save": (llama, {"target_modules": ["norm"]}, ["lm_head"]),
        "target_modules": (llama, {}, r".*layers\.2\..*norm"),
        "task_type": (llama, {"target_modules": ["norm"]}, "CAUSAL_LM"),
    },
    "TRAINABLE_TOKENS": {
        "inference_mode": (llama, {"token_indices": [3]}, False),
        "init_weights": (llama, {"token_indices": [3]}, False),
        "target_modules": (zoo, {"token_indices": [3]}, ["emb"]),
        "task_type": (llama, {"token_indices": [3]}, "CAUSAL_LM"),
        "token_indices": (llama, {}, [8, 3, 5]),
    },
}  # fmt: skip
# field -> a value that is refused, with the field's name
REFUSED: dict[str, dict[str, Any]] = {
    "LORA": {
        "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1}, "layer_replication": [[0, 2], [1, 3]],
        "megatron_config": {"x": 1}, "monteclora_config": {"x": 1}, "use_bdlora": {"x": 1}, "velora_config": {"rank": 3},
    },
}  # fmt: skip
# what only describes the file, or how training began; every value loads
SILENT: dict[str, dict[str, Any]] = {
    "LORA": {"corda_config": {"x": 1}, "eva_config": {"rho": 2.0}, "loftq_config": {"bits": 4}, "lora_ga_config": {"x": 1}, "megatron_core": "m"},
}
ABOUT = {"auto_mapping": {"x": 1}, "base_model_name_or_path": "someone/model", "peft_version": "0.99.0", "revision": "abc"}
OURS = {"LORA", "VERA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS"}  # the others' options are in the files of their methods


@pytest.mark.parametrize("kind", sorted(OURS))
def test_every_field_is_in_one_of_the_tables(kind: str) -> None:
    tables = [set(DONE[kind]), set(REFUSED.get(kind, {})), set(SILENT.get(kind, {})), set(ABOUT), {"peft_type", "runtime_config"}]
    names = {f.name for f in dataclasses.fields(CLASSES[kind])}
    assert set().union(*tables) - {"runtime_config"} == names - {"runtime_config"}
    assert sum(map(len, tables)) == len(set().union(*tables)), "a field stands in two tables"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in DONE.items() for f in fields])
def test_what_is_carried_out(kind: str, field: str, tmp_path: Path) -> None:
    make, options, value = DONE[kind][field]
    theirs_and_back(make, CLASSES[kind](**options, **{field: value}), tmp_path)


def written(kind: str, folder: Path) -> dict[str, Any]:
    make, options, value = DONE[kind]["task_type"]
    live = peft.get_peft_model(make(), CLASSES[kind](**options, task_type=value))
    shake(live.parameters())
    live.save_pretrained(str(folder))
    return {"make": make, "want": output(live.eval()), "config": json.loads((folder / "adapter_config.json").read_text())}


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in REFUSED.items() for f in fields])
def test_what_is_refused(kind: str, field: str, tmp_path: Path) -> None:
    found = written(kind, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(found["config"] | {field: REFUSED[kind][field]}))
    model = found["make"]()
    with pytest.raises(st.SlimtuneError, match=field):
        st.load(model, tmp_path)
    assert not hasattr(model, "slim_state")


@pytest.mark.parametrize("kind", sorted(OURS))
def test_what_means_nothing(kind: str, tmp_path: Path) -> None:
    found = written(kind, tmp_path)
    for field, value in (SILENT.get(kind, {}) | ABOUT).items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(found["config"] | {field: value}))
        st.load(model := found["make"](), tmp_path)
        assert (output(model) - found["want"]).abs().max() < 1e-5, field
