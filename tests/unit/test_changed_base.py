"""Tables of tokens that change: resized under an adapter, replaced, or brought along by a file of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune as st
from slimtune.core.errors import MismatchError, SiteError
from slimtune.testing.subject import fill

IDS = torch.tensor([[3, 4, 101, 7], [5, 102, 9, 10]])


def base(rows: int = 100, tie: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, tie_word_embeddings=tie)
    model = LlamaForCausalLM(config).eval()
    if rows > 100:
        torch.manual_seed(1)
        model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
def test_a_file_of_the_reference_with_tables_of_its_own_means_what_it_means_there(tie: bool, targets: list[str], tmp_path: Path) -> None:
    model = base(104, tie)
    torch.manual_seed(9)
    with torch.no_grad():
        model.model.embed_tokens.weight[100:] = torch.randn(4, 32)  # what training, or another seed, made of the new rows
        if not tie:
            model.lm_head.weight[100:] = torch.randn(4, 32)
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    again: Any = peft.PeftModel.from_pretrained(base(104, tie), str(tmp_path)).eval()  # it leaves out a head that is not tied
    want = again(IDS).logits.detach()
    assert "embed_tokens" in str(targets) or tie or torch.equal(want, theirs(IDS).logits)
    ours = base(104, tie)
    st.load(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-4)
    st.merge(ours, keep=False)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_tables_of_another_size_or_another_base_are_refused_with_a_hint_that_works(tmp_path: Path) -> None:
    model = base(104)
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    want = theirs(IDS).logits
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    small = base()
    with pytest.raises(MismatchError, match="does not fit") as found:
        st.load(small, tmp_path)
    assert "model.resize_token_embeddings(104)" in found.value.hint
    small.resize_token_embeddings(104)
    st.load(small, tmp_path)
    torch.testing.assert_close(small(IDS).logits, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(MismatchError, match="104 of its 104 rows are not those of this model"):
        st.load(base(104, seed=5), tmp_path)


@pytest.mark.parametrize("targets", [("embed_tokens",), ("lm_head",)], ids=str)
def test_tables_under_an_adapter_are_not_resized(targets: tuple[str, ...]) -> None:
    model = base()
    st.attach(model, st.LoRA(r=2, targets=targets))
    before = model.model.embed_tokens.weight.shape, model.lm_head.weight.shape
    with pytest.raises(SiteError, match=targets[0]) as found:
        model.resize_token_embeddings(104)
    assert (model.model.embed_tokens.weight.shape, model.lm_head.weight.shape) == before
    assert "st.detach(model, 'default'), model.resize_token_embeddings(104)" in found.value.hint
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    st.detach(model, "default")  # as the hint says
    model.resize_token_embeddings(104)
    st.attach(model, st.LoRA(r=2, targets=targets))
    model(IDS)


def test_tables_without_an_adapter_on_them_may_be_resized() -> None:
    model = base()
    st.attach(model, st.LoRA(r=2, targets=("q_proj",)))
    fill(model, "default")
    ids = IDS.clamp(max=99)
    want = model(ids).logits
    model.resize_token_embeddings(104)
    torch.testing.assert_close(model(ids).logits[..., :100], want, rtol=1e-5, atol=1e-5)
    assert model(IDS).logits.shape[-1] == 104
    st.detach(model, "default")
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("change", ["replaced", "resized"])
def test_a_module_that_was_changed_by_hand_is_named_before_it_is_saved_or_merged(change: str, tmp_path: Path) -> None:
    model = base()
    st.attach(model, st.LoRA(r=2, targets=("lm_head", "q_proj")))
    if change == "replaced":
        model.lm_head = nn.Linear(32, 100)
    else:
        model.lm_head.weight = nn.Parameter(torch.zeros(104, 32))
        model.lm_head.out_features = 104
    for call in (lambda: st.save(model, tmp_path / "a"), lambda: st.merge(model), lambda: st.merge(model, out=tmp_path / "b")):
        with pytest.raises(SiteError, match=f"lm_head was {change}"):
            call()
    st.detach(model, "default")
    assert type(model) is LlamaForCausalLM
