"""Files of DoRA, VeRA, IA3 and LayerNorm tuning in both directions with the reference library; outputs equal to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import bert, config_in, gpt2, llama, ours_and_back, output, shake, t5, theirs_and_back, unet, zoo
from safetensors.torch import load_file, save_file

import slimtune as st

QV: dict[Any, list[str]] = {llama: ["q_proj", "v_proj"], bert: ["query", "value"], t5: ["q", "v"], unet: ["to_q", "to_v"], gpt2: ["c_attn", "c_proj"]}
FF: dict[Any, list[str]] = {llama: ["down_proj"], bert: ["output.dense"], t5: ["wo"], unet: ["ff.net.2"], gpt2: ["mlp.c_proj"]}
NORMS: dict[Any, Any] = {
    llama: ["input_layernorm", "norm"], bert: ["LayerNorm"], t5: ["layer_norm"], unet: ["norm1", "conv_norm_out"], gpt2: ["ln_1", "ln_f"],
}  # fmt: skip
MODELS = list(QV)


def dora(make: Any, **options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": QV.get(make)} | options))


def vera(make: Any, **options: Any) -> peft.PeftConfig:
    return peft.VeraConfig(**({"r": 8, "target_modules": [*QV.get(make, []), *FF.get(make, [])]} | options))


def ia3(make: Any, **options: Any) -> peft.PeftConfig:
    named = {"target_modules": [*QV.get(make, []), *FF.get(make, [])], "feedforward_modules": FF.get(make)}
    return peft.IA3Config(**(named | options))


def ln(make: Any, **options: Any) -> peft.PeftConfig:
    return peft.LNTuningConfig(**({"target_modules": NORMS.get(make)} | options))


@pytest.mark.parametrize("config", [dora, vera, ia3, ln])
@pytest.mark.parametrize("make", MODELS)
def test_theirs_here_and_back(make: Any, config: Any, tmp_path: Path) -> None:
    theirs_and_back(make, config(make), tmp_path)


# Every other option of the config classes; `test_every_field` tells when the reference gets a new one.
OPTIONS = {
    "dora: convolutions": (zoo, dora, {"target_modules": ["conv1", "conv2", "conv3", "q"]}),
    "dora: embedding": (zoo, dora, {"target_modules": ["emb", "q"]}),
    "dora: tied embedding": (gpt2, dora, {"target_modules": ["wte", "c_attn"]}),
    "dora: patterns": (llama, dora, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}),
    "dora: layers": (llama, dora, {"layers_to_transform": [0, 2]}),
    "dora: biases": (gpt2, dora, {"bias": "lora_only"}),
    "dora: all biases": (gpt2, dora, {"bias": "all"}),
    "dora: classifier": (bert, dora, {"task_type": "SEQ_CLS"}),
    "vera: key": (llama, vera, {"projection_prng_key": 7, "d_initial": 0.3, "vera_dropout": 0.1}),
    "vera: not saved": (llama, vera, {"save_projection": False, "projection_prng_key": 3}),
    "vera: layers": (llama, vera, {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "vera: biases": (gpt2, vera, {"bias": "vera_only"}),
    "vera: all biases": (bert, vera, {"bias": "all", "modules_to_save": ["classifier"]}),
    "vera: classifier": (bert, vera, {"task_type": "SEQ_CLS"}),
    "vera: regex": (llama, vera, {"target_modules": r".*layers\.[02]\..*_proj"}),
    "vera: all-linear": (llama, vera, {"target_modules": "all-linear"}),
    "ia3: convolutions": (zoo, ia3, {"target_modules": ["conv2", "conv3", "q"], "feedforward_modules": []}),
    "ia3: inputs of convolutions": (zoo, ia3, {"target_modules": ["conv2", "conv3", "q"], "feedforward_modules": ["conv2", "conv3"]}),
    "ia3: regex": (llama, ia3, {"target_modules": r".*layers\.[02]\..*(k|v|down)_proj", "feedforward_modules": r".*layers\.2.*down_proj"}),
    "ia3: no feed-forward": (bert, ia3, {"feedforward_modules": [], "modules_to_save": ["classifier"]}),
    "ia3: letters": (zoo, ia3, {"target_modules": ["q", "fc_q"], "feedforward_modules": ["q"]}),  # fits fc_q, too: it ends with q
    "ia3: exclude": (llama, ia3, {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "ia3: model's own": (gpt2, ia3, {"target_modules": None, "feedforward_modules": None}),
    "ia3: classifier": (bert, ia3, {"task_type": "SEQ_CLS"}),
    "ln: model's own": (llama, ln, {"target_modules": None}),
    "ln: regex": (bert, ln, {"target_modules": r".*layer\.1.*LayerNorm"}),
    "ln: exclude": (llama, ln, {"exclude_modules": r".*layers\.1.*", "modules_to_save": ["lm_head"]}),
    "ln: classifier": (bert, ln, {"task_type": "SEQ_CLS"}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_here_and_back(case: str, tmp_path: Path) -> None:
    make, config, options = OPTIONS[case]
    theirs_and_back(make, config(make, **options), tmp_path)


OURS = {
    "DoRA": (llama, st.DoRA(), "LORA"),
    "DoRA, options": (llama, st.DoRA(of=st.LoRA(r=4, rank_pattern={"q": 2}, rank_stabilised=True), layers="last:2", targets=("q", "down")), "LORA"),
    "DoRA, head": (bert, st.DoRA(of=st.LoRA(r=4), targets=("q", "v"), train_modules="classifier"), "LORA"),
    "DoRA, no head": (bert, st.DoRA(of=st.LoRA(r=4), targets=("q", "v")), "LORA"),
    "DoRA, UNet": (unet, st.DoRA(of=st.LoRA(r=4), targets=("attention", "conv_in")), "LORA"),
    "DoRA, Conv1D and embedding": (gpt2, st.DoRA(of=st.LoRA(r=4), targets=("all-linear", "wte")), "LORA"),
    "VeRA": (llama, st.VeRA(r=8, seed=5), "VERA"),
    "VeRA, T5": (t5, st.VeRA(r=8, targets="attention"), "VERA"),
    "VeRA, head": (bert, st.VeRA(r=8, train_modules="classifier"), "VERA"),
    "VeRA, UNet": (unet, st.VeRA(r=8, layers=None, targets="attention"), "VERA"),
    "VeRA and biases": (gpt2, st.Union(of=(st.VeRA(r=8, targets="c_attn"), st.BitFit(targets=("c_attn", "norm")))), "VERA"),
    "VeRA, layers": (llama, st.VeRA(r=8, layers="1-2"), "VERA"),
    "IA3": (llama, st.IA3(), "IA3"),
    "IA3, GPT-2": (gpt2, st.IA3(), "IA3"),
    "IA3, T5": (t5, st.IA3(), "IA3"),
    "IA3, one input": (llama, st.IA3(targets=("k", "down"), feedforward=("re:.*layers.1.*down_proj",)), "IA3"),
    "IA3, head": (bert, st.IA3(train_modules="classifier"), "IA3"),
    "IA3, no head": (bert, st.IA3(), "IA3"),
    "IA3, UNet": (unet, st.IA3(targets=("k", "v", "down", "conv_in"), feedforward=("down", "conv_in")), "IA3"),
    "LayerNorm": (llama, st.LayerNormTuning(), "LN_TUNING"),
    "LayerNorm, head": (bert, st.LayerNormTuning(layers="last:1", train_modules="classifier"), "LN_TUNING"),
    "LayerNorm, UNet": (unet, st.LayerNormTuning(), "LN_TUNING"),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_there_and_back(case: str, tmp_path: Path) -> None:
    make, spec, kind = OURS[case]
    ours_and_back(make, spec, tmp_path, kind)


# What the reference has no form for gets our own, and no other.
ONLY_OURS = {
    "a magnitude over VeRA": (llama, st.DoRA(of=st.VeRA(r=8))),
    "a magnitude of a grouped convolution": (zoo, st.DoRA(of=st.LoRA(r=4), targets="grouped")),
    "IA3 of an embedding": (zoo, st.IA3(targets="emb")),
    "biases where there were none": (llama, st.Union(of=(st.LoRA(r=4), st.BitFit(missing="add", targets="q_proj")))),
    "biases beside IA3": (gpt2, st.Union(of=(st.IA3(), st.BitFit(targets="c_attn")))),
    "biases alone": (llama, st.BitFit(missing="add")),
    "full training alone": (llama, st.Dense()),
}


@pytest.mark.parametrize("case", ONLY_OURS)
def test_what_only_we_can_say(case: str, tmp_path: Path) -> None:
    make, spec = ONLY_OURS[case]
    live = make()
    st.attach(live, spec)
    shake(live.parameters())
    want = output(live)
    st.save(live, tmp_path)
    assert config_in(tmp_path)["peft_type"] == f"SLIMTUNE_{spec.method.upper()}"
    mine = make()
    st.load(mine, tmp_path)
    assert (output(mine) - want).abs().max() < 1e-6


@pytest.mark.parametrize("key", [0, 1, 123456789])
def test_vera_draws_the_matrices_of_the_reference(key: int, tmp_path: Path) -> None:
    live = peft.get_peft_model(llama(), vera(llama, projection_prng_key=key))
    mine = llama()
    st.attach(mine, st.VeRA(r=8, seed=key, targets=("q", "v", "down")))
    op: Any = next(iter(mine.slim_state.adapters["default"].ops.values()))
    assert torch.equal(op.shared_A.source(), live.base_model.vera_A["default"])
    assert torch.equal(op.shared_B.source(), live.base_model.vera_B["default"])


def test_vera_keeps_matrices_that_no_seed_gives(tmp_path: Path) -> None:
    live = peft.get_peft_model(llama(), vera(llama))
    shake(live.parameters())
    live.save_pretrained(str(tmp_path / "drawn"))
    live.base_model.vera_A["default"].mul_(1.5)
    want = output(live.eval())
    live.save_pretrained(str(tmp_path / "theirs"))
    mine = llama()
    st.load(mine, tmp_path / "theirs")
    assert (output(mine) - want).abs().max() < 1e-5
    made = {id(op.shared_A) for op in mine.slim_state.adapters["default"].ops.values()}
    assert len(made) == 1  # one copy for all layers
    st.save(mine, tmp_path / "ours")
    assert config_in(tmp_path / "ours")["save_projection"] is True
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    assert (output(back) - want).abs().max() < 1e-5
    again = llama()
    st.load(again, tmp_path / "ours")
    assert (output(again) - want).abs().max() < 1e-5

    st.load(mine, tmp_path / "drawn", name="drawn")
    st.save(mine, tmp_path / "small", name="drawn")  # the key gives them: nothing but the vectors is kept
    assert config_in(tmp_path / "small")["save_projection"] is False
    assert not any("vera_A" in k for k in load_file(tmp_path / "small/adapter_model.safetensors"))


def saved(config: peft.PeftConfig, folder: Path, make: Any = llama) -> torch.Tensor:
    live = peft.get_peft_model(make(), config)
    shake(live.parameters())
    live.save_pretrained(str(folder))
    return output(live.eval())


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> None:
    import json

    config = config_in(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("config", [dora, vera, ia3, ln])
def test_damage_is_named(config: Any, tmp_path: Path) -> None:
    saved(config(llama), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = sorted(k for k in tensors if "layers.1" in k)[-1]
    module = last.split("base_model.model.")[1].rsplit(".layers.1.", 1)[1].split(".")[0]
    rewrite(tmp_path, {k: v for k, v in tensors.items() if k != last})
    with pytest.raises(st.SlimtuneError, match=rf"layers\.1\.{module}|layers\.1\."):
        st.load(llama(), tmp_path)
    rewrite(tmp_path, {**tensors, last: torch.zeros(3)})
    with pytest.raises(st.SlimtuneError, match=r"layers\.1\."):
        st.load(llama(), tmp_path)
    rewrite(tmp_path, {**tensors, "base_model.model.model.layers.7.self_attn.q_proj.weight": torch.zeros(3)})
    with pytest.raises(st.SlimtuneError, match=r"layers\.7"):
        st.load(llama(), tmp_path)
    rewrite(tmp_path, tensors, target_modules=[*config_in(tmp_path)["target_modules"], "gate_proj"])
    if config is not ln:
        with pytest.raises(st.SlimtuneError, match="gate_proj"):
            st.load(llama(), tmp_path)


@pytest.mark.parametrize("config", [dora, vera, ia3, ln])
def test_old_and_new_configs(config: Any, tmp_path: Path) -> None:
    want = saved(config(llama), tmp_path)
    rewrite(tmp_path, wormhole={"depth": 3})
    with pytest.raises(st.SlimtuneError, match="wormhole"):
        st.load(llama(), tmp_path)
    report = st.load(model := llama(), tmp_path, relax="config")
    assert (output(model) - want).abs().max() < 1e-5, report
    keep = {"peft_type", "r", "lora_alpha", "target_modules", "use_dora", "feedforward_modules", "projection_prng_key"}
    rewrite(tmp_path, **{k: "gone" for k in config_in(tmp_path) if k not in keep})  # as an old version wrote it
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, tensors)
    st.load(model := llama(), tmp_path)
    assert (output(model) - want).abs().max() < 1e-5
    bare = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}  # written without a wrapper around the model
    rewrite(tmp_path, bare, peft_version="99.0.0")
    st.load(model := llama(), tmp_path)
    assert (output(model) - want).abs().max() < 1e-5


def test_the_shape_of_an_ia3_vector_says_which_side_it_scales(tmp_path: Path) -> None:
    saved(ia3(llama), tmp_path)
    rewrite(tmp_path, feedforward_modules=["q_proj", "down_proj"])  # as many inputs as outputs, yet another vector
    with pytest.raises(st.SlimtuneError, match=r"q_proj\.ia3_l is \[16, 1\] in the file, \[1, 16\] here"):
        st.load(llama(), tmp_path)


def test_a_magnitude_over_a_start_that_is_taken_away(tmp_path: Path) -> None:
    """PiSSA keeps its start beside A and B: there a plain LoRA of twice the rank, here it goes on as it was."""
    live = llama()
    st.attach(live, st.DoRA(of=st.LoRA(r=2, init="pissa"), targets=("q", "v")))
    torch.manual_seed(7)
    for p in live.slim_state.adapters["default"].parameters():
        p.data += 0.1 * torch.randn_like(p)
    want = output(live)
    st.save(live, tmp_path)
    assert (config_in(tmp_path)["peft_type"], config_in(tmp_path)["r"]) == ("LORA", 4)
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert (output(theirs) - want).abs().max() < 1e-5
    report = st.load(mine := llama(), tmp_path, trainable=True)
    assert (output(mine) - want).abs().max() < 1e-6
    assert report.trainable == st.report(live).trainable


def test_a_magnitude_under_its_longer_name(tmp_path: Path) -> None:
    want = saved(dora(llama), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rewrite(tmp_path, {f"{k}.weight" if k.endswith("magnitude_vector") else k: v for k, v in tensors.items()})
    st.load(model := llama(), tmp_path)
    assert (output(model) - want).abs().max() < 1e-5


def test_a_norm_layout_with_other_modules_is_refused_by_name(tmp_path: Path) -> None:
    saved(ln(llama, target_modules=["norm", "q_proj"]), tmp_path)
    with pytest.raises(st.SlimtuneError, match=r"q_proj.*is no norm"):
        st.load(llama(), tmp_path)


@pytest.mark.slow
def test_the_bin_of_an_adapter_is_converted_with_the_line_of_the_error(tmp_path: Path) -> None:
    import subprocess

    want = saved(ia3(llama), tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(st.SlimtuneError) as caught:
        st.load(llama(), tmp_path)
    line = str(caught.value.hint).partition(": ")[2]
    subprocess.run(["/bin/sh", "-c", line.replace("python", __import__("sys").executable, 1)], cwd=tmp_path, check=True)
    st.load(model := llama(), tmp_path)
    assert (output(model) - want).abs().max() < 1e-5
