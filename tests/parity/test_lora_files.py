"""LoRA files in both directions with the reference library: what it wrote loads here, what we wrote loads there, outputs equal to 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from pairs import bert, gpt2, llama, mixtral, ours_and_back, output, shake, t5, theirs_and_back, unet, zoo

import slimtune as st

# Every case is a reference config; the reference's own file is loaded, compared, saved again by us, and loaded there.
THEIRS = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "regex": (llama, {"target_modules": r"model\.layers\.[02]\..*(q|v)_proj"}),
    "a name that is a role here": (zoo, {"target_modules": ["q"]}),
    "full path": (zoo, {"target_modules": ["layers.1.q", "layers.2.fc_q"]}),
    "layers_to_transform": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "layers_pattern": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    "exclude_modules": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "exclude by regex": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3, "up_proj": 5, r"layers\.[12]\..*v_proj": 2},
            "alpha_pattern": {"v_proj": 7, "layers.0.mlp.up_proj": 11},
        },
    ),
    "rslora and patterns": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ),
    "lora_bias": (zoo, {"target_modules": ["q", "conv1"], "lora_bias": True}),
    "bias lora_only": (zoo, {"target_modules": ["q", "fc_q", "conv1"], "bias": "lora_only"}),
    "bias all": (zoo, {"target_modules": ["fc_q", "q"], "bias": "all"}),
    "bias all, saved head": (zoo, {"target_modules": ["q"], "bias": "all", "modules_to_save": ["score"]}),
    "modules_to_save": (zoo, {"target_modules": ["q"], "modules_to_save": ["score", "norm"]}),
    "modules_to_save that is embedding": (zoo, {"target_modules": ["q"], "modules_to_save": ["emb"]}),
    "sequence classification": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "UNet": (unet, {"target_modules": ["to_q", "to_v", "conv1", "proj_in"]}),
    "UNet, patterns": (unet, {"target_modules": ["to_q", "conv_in"], "rank_pattern": {"conv_in": 2}, "modules_to_save": ["conv_out"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "task_type": "CAUSAL_LM"}),
    "Conv1D in full": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}),
    "embedding": (zoo, {"target_modules": ["emb", "q"]}),
    "tied embedding": (gpt2, {"target_modules": ["wte", "c_attn"]}),
    "embed_tokens": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "conv 1, 2, 3": (zoo, {"target_modules": ["conv1", "conv2", "conv3"]}),
    "grouped conv": (zoo, {"target_modules": ["grouped"]}),
    "MultiheadAttention": (zoo, {"target_modules": ["mha"]}),
    "everything": (zoo, {"target_modules": ["emb", "conv1", "conv2", "conv3", "mha", "q", "fc_q"], "rank_pattern": {"mha": 2, "conv2": 3}}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts, one parameter": (mixtral, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "experts, ranks": (
        mixtral,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank_pattern": {"experts.down_proj": 3}},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_here_and_back(case: str, tmp_path: Path) -> None:
    make, options = THEIRS[case]
    theirs_and_back(make, peft.LoraConfig(r=4, lora_alpha=6, **options), tmp_path)


OURS = {
    "defaults": (llama, st.LoRA()),
    "layers": (llama, st.LoRA(r=4, layers="last:2", targets=("q_proj", "mlp"))),
    "one layer by path": (llama, st.LoRA(r=4, targets=("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"))),
    "exclude": (llama, st.LoRA(r=4, exclude=("layers.1.mlp",))),
    "patterns": (llama, st.LoRA(r=4, rank_pattern={"re:.*layers.0.*": 2, "down": 6}, alpha_pattern={"q": 5.0, "re:.*2.*v_proj": 1.5})),
    "rank stabilised": (llama, st.LoRA(r=5, alpha=3.0, rank_stabilised=True, rank_pattern={"q": 2})),
    "up_bias": (gpt2, st.LoRA(r=4, up_bias=True)),
    "head in full": (llama, st.LoRA(r=4, train_modules="lm_head")),
    "norms in full": (llama, st.LoRA(r=4, targets="attention", train_modules=("norm",))),
    "no classifier": (bert, st.LoRA(r=4, targets=("q", "v"))),
    "classifier": (bert, st.LoRA(r=4, targets=("q", "v"), train_modules="classifier")),
    "LoRA on the classifier": (bert, st.LoRA(r=4, targets=("q", "classifier"))),
    "T5": (t5, st.LoRA(r=4, targets="attention")),
    "Conv1D": (gpt2, st.LoRA(r=4)),
    "UNet": (unet, st.LoRA(r=4, targets=("attention", "mlp", "conv_in"))),
    "and its biases": (gpt2, st.Union(of=(st.LoRA(r=4, targets="c_attn"), st.BitFit(targets="c_attn")))),
    "and biases": (gpt2, st.Union(of=(st.LoRA(r=4, targets="c_attn"), st.BitFit(targets=("c_attn", "c_fc", "norm"))))),
    "Conv1D in full": (gpt2, st.LoRA(r=4, targets="qkv", train_modules=("mlp.c_proj",))),
    "embedding": (zoo, st.LoRA(r=4, targets=("embedding", "q"))),
    "convolutions": (zoo, st.LoRA(r=4, targets="conv")),
    "attention module": (zoo, st.LoRA(r=4, targets="mha")),
    "zoo": (zoo, st.LoRA(r=4, targets=("all-linear", "conv", "embedding"), rank_pattern={"grouped": 2})),
    "experts": (mixtral, st.LoRA(r=4, targets=("experts", "all-linear"))),
    "experts, ranks": (mixtral, st.LoRA(r=4, targets="experts", rank_pattern={"re:.*layers.0.*": 2})),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_there_and_back(case: str, tmp_path: Path) -> None:
    make, spec = OURS[case]
    ours_and_back(make, spec, tmp_path, "LORA")


@pytest.mark.parametrize("make", [llama, gpt2, zoo, mixtral])
def test_a_frozen_start_is_a_plain_lora_there_and_goes_on_here(make, tmp_path: Path) -> None:
    live = make()
    targets = ("all-linear", "conv", "embedding") if make is zoo else ("all-linear", "experts") if make is mixtral else "all-linear"
    st.attach(live, st.LoRA(r=4, targets=targets, rank_stabilised=True))
    adapter = live.slim_state.adapters["default"]
    shake(adapter.parameters())
    for op in adapter.ops.values():
        op.freeze_start()
    assert (output(live) - output(make())).abs().max() < 1e-5  # zero at the start, whatever A and B are
    torch.manual_seed(3)
    for p in adapter.parameters():
        p.data += 0.1 * torch.randn_like(p)
    want = output(live)
    st.save(live, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 8

    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert (output(theirs) - want).abs().max() < 1e-5
    mine = make()
    report = st.load(mine, tmp_path / "ours", trainable=True)
    assert (output(mine) - want).abs().max() < 1e-6
    assert report.trainable == st.report(live).trainable  # only A and B train, not the frozen halves
    for key, op in mine.slim_state.adapters["default"].ops.items():
        assert torch.equal(op.A0, adapter.ops[key].A0)
        assert torch.equal(op.B0, adapter.ops[key].B0)


NOT_DONE = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "init_lora_weights": {"init_lora_weights": "corda"},
    "velora_config": {"velora_config": {"rank": 3}},
    "megatron_config": {"megatron_config": {"x": 1}},
    "wormhole": {"wormhole": True},
}


@pytest.mark.parametrize("field", NOT_DONE)
def test_an_option_that_is_not_done_is_named(field: str, tmp_path: Path) -> None:
    live = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    live.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | NOT_DONE[field]))
    model = llama()
    with pytest.raises(st.SlimtuneError, match=field):
        st.load(model, tmp_path)
    assert not hasattr(model, "slim_state")


def test_a_targeted_module_without_tensors_is_missed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    live = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    live.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    cut = {k: v for k, v in tensors.items() if "layers.1.self_attn.v_proj" not in k}
    save_file(cut, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(st.SlimtuneError, match=r"layers\.1\.self_attn\.v_proj"):
        st.load(llama(), tmp_path)
    assert len(st.load(llama(), tmp_path, relax="missing").rows) == 5


def test_our_config_is_what_the_reference_would_write(tmp_path: Path) -> None:
    live = llama()
    st.attach(live, st.LoRA(r=4))
    st.save(live, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    a, b = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs"))
    b["target_modules"] = sorted(b["target_modules"])
    assert a == b
    assert a["task_type"] == "CAUSAL_LM"
