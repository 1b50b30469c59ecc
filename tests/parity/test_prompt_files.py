"""Files of virtual-token methods in both directions with the reference library: what it wrote loads here, what we wrote loads there."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import FormatError, MismatchError

warnings.filterwarnings("ignore")

P = 3
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 13, "max_position_embeddings": 32,
}  # fmt: skip


def make(cls: str, config: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=1.0 if p.dim() == 1 and p.mean() == 1 else 0.0, std=0.3)
    return model


MODELS = {
    "llama": lambda: make("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1),
    "gpt2": lambda: make("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=13, n_positions=32),
    "llama classifier": lambda: make("LlamaForSequenceClassification", "LlamaConfig", **SMALL, num_key_value_heads=1, num_labels=3, pad_token_id=0),
    "bert": lambda: make("BertForSequenceClassification", "BertConfig", **SMALL, num_labels=3),
    "bert tagger": lambda: make("BertForTokenClassification", "BertConfig", **SMALL, num_labels=3),
    "bert answers": lambda: make("BertForQuestionAnswering", "BertConfig", **SMALL),
    "roberta": lambda: make("RobertaForSequenceClassification", "RobertaConfig", **SMALL, num_labels=3),
    "distilbert": lambda: make(
        "DistilBertForSequenceClassification", "DistilBertConfig", dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=13, num_labels=3,
        max_position_embeddings=32,
    ),
    "t5": lambda: make(
        "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=13,
        decoder_start_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
TASKS = {
    "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "llama classifier": "SEQ_CLS", "bert": "SEQ_CLS", "bert tagger": "TOKEN_CLS", "bert answers":
    "QUESTION_ANS", "roberta": "SEQ_CLS", "distilbert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM",
}  # fmt: skip
METHODS = {
    "prompt": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}
CASES = [(m, k) for m in MODELS for k in METHODS if k == "prompt" or m in {"llama", "bert", "t5"}]
IDS = torch.arange(12).reshape(2, 6) % 11 + 2
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])  # padded on the right
LABELS = torch.tensor([[3, 4, 5], [6, 7, 1]])
WHICH = torch.tensor([2, 0])


def given(model: str, method: str) -> dict[str, Tensor]:
    # The reference looks for the last token of a padded row among ids that it has replaced, so a classifier of that kind gets full rows.
    mask = torch.ones_like(MASK) if model == "llama classifier" else MASK
    return {"input_ids": IDS, "attention_mask": mask, **({"labels": LABELS} if model == "t5" else {})}


def theirs(wrapped: Any, model: str, method: str) -> Tensor:
    with torch.no_grad():
        out = wrapped(**given(model, method), **({"task_ids": WHICH} if method == "multitask" else {}))
    logits: Tensor = out.start_logits if model == "bert answers" else out.logits
    return logits[:, -(LABELS if model == "t5" else IDS).shape[1] :] if TASKS[model] != "SEQ_CLS" else logits


def ours(model: nn.Module, name: str, method: str) -> Tensor:
    with torch.no_grad(), st.tasks(model, WHICH if method == "multitask" else None):
        out = model(**given(name, method))
    logits: Tensor = out.start_logits if name == "bert answers" else out.logits
    return logits


def same(got: Tensor, want: Tensor, name: str) -> None:
    real = MASK.bool() if TASKS[name] not in {"SEQ_CLS", "SEQ_2_SEQ_LM"} else ...
    assert got.shape == want.shape
    assert torch.allclose(got[real], want[real], atol=1e-5), (got[real] - want[real]).abs().max()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_their_files(name: str, method: str, tmp_path: Path) -> None:
    """Their file gives their outputs here; what we save of it is again a file of theirs, with the same outputs."""
    cls, options = METHODS[method]
    config = getattr(peft, cls)(task_type=TASKS[name], num_virtual_tokens=P, token_dim=16, num_attention_heads=2, **options)
    wrapped = peft.get_peft_model(MODELS[name](), config).eval()
    torch.manual_seed(7)
    for p in wrapped.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    want = theirs(wrapped, name, method)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = MODELS[name]()
    base = ours_base(model, name)
    report = st.load(model, tmp_path / "theirs")
    assert report.rows
    got = ours(model, name, method)
    assert not torch.allclose(got, base, atol=1e-2), "the adapter does nothing"
    same(got, want, name)
    st.save(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == wrapped.active_peft_config.peft_type.value
    again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours").eval()
    assert torch.allclose(theirs(again, name, method), want, atol=1e-5)
    twin = MODELS[name]()
    st.load(twin, tmp_path / "ours")
    assert torch.allclose(ours(twin, name, method), got, atol=1e-6)


def ours_base(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        out = model(**given(name, ""))
    return out.start_logits if name == "bert answers" else out.logits


SPECS = {
    "prompt": st.PromptTuning(tokens=P),
    "mlp": st.PTuning(tokens=P, hidden=8),
    "lstm": st.PTuning(tokens=P, hidden=8, encoder="lstm"),
    "multitask": st.MultitaskPromptTuning(tokens=P, tasks=3, r=2),
}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_our_files(name: str, method: str, tmp_path: Path) -> None:
    """An adapter of ours, with its head where there is one, gives our outputs in the reference."""
    model = MODELS[name]()
    head = next((h for h in ("classifier", "score", "qa_outputs") if h in model._modules), None)
    trained = () if head is None else (rf"re:(pre_)?{head}(\..*)?",)
    spec = dataclasses.replace(SPECS[method], train_modules=trained, keep=name in {"roberta", "distilbert"})
    st.attach(model, spec)
    torch.manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.add_(torch.randn_like(p), alpha=0.3)
    want = ours(model, name, method)
    st.save(model, tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    same(want, theirs(again, name, method), name)


def test_decoder_prompts_of_several_tasks(tmp_path: Path) -> None:
    """Prompts in front of both stacks go over and back, bit by bit; with factors that differ they stay in a layout of our own."""
    model = MODELS["t5"]()
    st.attach(model, st.MultitaskPromptTuning(tokens=P, tasks=3, r=2, decoder=True))
    ops = [op for op in model.slim_state.adapters["default"].ops.values() if op.port == "stream"]
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    st.save(model, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["peft_type"] == "SLIMTUNE_MULTITASK_PROMPT_TUNING"
    with torch.no_grad():
        ops[1].v.copy_(ops[0].v)
    want = ours(model, "t5", "multitask")
    st.save(model, tmp_path / "both")
    again = peft.PeftModel.from_pretrained(MODELS["t5"](), tmp_path / "both").eval()
    assert again.active_peft_config.num_transformer_submodules == 2
    same(want, theirs(again, "t5", "multitask"), "t5")


def test_a_head_that_reads_the_first_place_is_written_only_where_it_reads_the_same(tmp_path: Path) -> None:
    for keep, kind in ((False, "SLIMTUNE_PROMPT_TUNING"), (True, "PROMPT_TUNING")):
        model = MODELS["roberta"]()
        st.attach(model, st.PromptTuning(tokens=P, keep=keep, train_modules=("classifier.dense", "out_proj")))
        st.save(model, tmp_path / kind)
        assert json.loads((tmp_path / kind / "adapter_config.json").read_text())["peft_type"] == kind


def test_a_file_for_another_base_is_refused(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(MODELS["llama"](), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    wrapped.save_pretrained(tmp_path)
    for other in (
        make("LlamaForCausalLM", "LlamaConfig", **{**SMALL, "hidden_size": 32}, num_key_value_heads=1),
        make("ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4),
    ):
        with pytest.raises(MismatchError) as caught:
            st.load(other, tmp_path)
        assert caught.value.hint
        assert "slim_state" not in other.__dict__
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": P + 1}))
    with pytest.raises((MismatchError, FormatError), match="config says"):
        st.load(MODELS["llama"](), tmp_path)


def test_text_inits_do_not_matter_for_loading(tmp_path: Path) -> None:
    """The reference's files remember a text and a tokenizer; a file is loaded without either."""
    wrapped = peft.get_peft_model(MODELS["llama"](), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    wrapped.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello", "tokenizer_name_or_path": "nowhere/none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = MODELS["llama"]()
    st.load(model, tmp_path)
    same(ours(model, "llama", "prompt"), theirs(wrapped.eval(), "llama", "prompt"), "llama")


def test_a_head_that_averages_is_refused(tmp_path: Path) -> None:
    def modernbert() -> nn.Module:
        return make(
            "ModernBertForSequenceClassification", "ModernBertConfig", **SMALL, num_labels=3, pad_token_id=0, cls_token_id=1, sep_token_id=2,
            bos_token_id=1, eos_token_id=2, classifier_pooling="mean",
        )  # fmt: skip

    wrapped = peft.get_peft_model(modernbert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P))
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.raises(MismatchError, match="averages over the virtual tokens"):
        st.load(modernbert(), tmp_path / "theirs")
    model = modernbert()
    st.attach(model, st.PromptTuning(tokens=P))
    want = model(IDS, attention_mask=MASK).logits
    st.save(model, tmp_path / "ours")
    other = modernbert()
    st.load(other, tmp_path / "ours")
    assert torch.equal(other(IDS, attention_mask=MASK).logits, want)
