"""LoRA files in both directions with the reference library: what it wrote loads here, what we wrote loads there, outputs equal to 1e-5."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimtune as st

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore")


class Zoo(nn.Module):
    """One module of every kind, and names that patterns can trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "fc_q": nn.Linear(8, 8, bias=False)}) for _ in range(3)])
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)  # [n, 6, 8]
        c = h.transpose(1, 2)
        h = h + (self.conv1(c) + self.grouped(c)).transpose(1, 2)
        h = h + self.conv2(h[:, None]).flatten(1)[:, :8][:, None]
        h = h + self.conv3(h.reshape(h.shape[0], 1, 6, 2, 4)).flatten(1)[:, :8][:, None]
        for layer in self.layers:
            h = h + layer["q"](torch.tanh(layer["fc_q"](h)))
        h = h + self.mha(h, h, h)[0]
        return self.score(self.norm(h))


def zoo() -> nn.Module:
    torch.manual_seed(0)
    return Zoo().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=13, n_positions=16)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=3, intermediate_size=24)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=13, max_position_embeddings=16, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=13, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_hidden_layers=2, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 13, "max_position_embeddings": 16}


def output(model: nn.Module) -> Tensor:
    ids = torch.arange(12).reshape(2, 6) % 13
    with torch.no_grad():
        kwargs = {"decoder_input_ids": ids} if _is_t5(model) else {}
        out = model(ids, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


def _is_t5(model: nn.Module) -> bool:
    return any(type(m).__name__ == "T5ForConditionalGeneration" for m in model.modules())


def shake(parameters, std: float = 0.2) -> None:
    torch.manual_seed(7)
    for p in parameters:
        if p.requires_grad:
            torch.nn.init.normal_(p, std=std)


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
    live = peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    shake(live.parameters())
    want = output(live.eval())
    live.save_pretrained(str(tmp_path / "theirs"))
    assert (output(make()) - want).abs().max() > 1e-4

    mine = make()
    report = st.load(mine, tmp_path / "theirs")
    assert (output(mine) - want).abs().max() < 1e-5, report
    st.save(mine, tmp_path / "ours")

    back = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert (output(back) - want).abs().max() < 1e-5
    again = make()
    st.load(again, tmp_path / "ours")
    assert (output(again) - want).abs().max() < 1e-5
    st.save(again, tmp_path / "again")
    assert _bytes(tmp_path / "ours") == _bytes(tmp_path / "again")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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
    "classifier": (bert, st.LoRA(r=4, targets=("q", "v"), train_modules="classifier")),
    "LoRA on the classifier": (bert, st.LoRA(r=4, targets=("q", "classifier"))),
    "T5": (t5, st.LoRA(r=4, targets="attention")),
    "Conv1D": (gpt2, st.LoRA(r=4)),
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
    live = make()
    st.attach(live, spec, name="mine")
    shake(live.parameters())
    want = output(live)
    st.save(live, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    assert (output(theirs) - want).abs().max() < 1e-5
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = make()
    st.load(mine, tmp_path / "theirs")
    assert (output(mine) - want).abs().max() < 1e-5


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
    "use_dora": {"use_dora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [1]}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "init_lora_weights": {"init_lora_weights": "corda"},
    "use_qalora": {"use_qalora": True},
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
