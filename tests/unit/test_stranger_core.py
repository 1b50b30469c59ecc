"""What somebody who had read the README only found in the core: no wrong result in silence, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune as st


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize("w", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_of_a_plan_is_finite(w: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    st.attach(model, st.LoRA(r=2), name="a")
    st.attach(model, st.LoRA(r=2), name="b")
    for plan in ({"a": w}, {"a": 0.5, "b": w}):
        with pytest.raises(st.PlanError, match="weight of"):
            st.use(model, plan)
    with pytest.raises(st.PlanError, match="weight of"):
        st.use(model, rows=["a", {"b": w}])


def test_a_merge_does_not_overwrite_the_base_it_was_opened_from(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    st.attach(model, st.LoRA(r=2))
    with pytest.raises(st.MergeError, match="opened from"):
        st.merge(model, out=tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    st.merge(model, out=tmp_path / "merged")  # the hint
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_model_of_peft_is_refused_before_anything_changes() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    live = [n for n, p in model.named_parameters() if p.requires_grad]
    for target in (model, model.base_model.model):
        with pytest.raises(st.SiteError, match="adapters of peft"):
            st.attach(target, st.LoRA(r=2))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == live
    st.attach(model.merge_and_unload(), st.LoRA(r=2))  # the hint


def test_a_merged_adapter_has_no_parameters_to_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    st.attach(model, st.LoRA(r=2))
    st.merge(model)
    with pytest.raises(st.MergeError, match="unmerge"):
        st.param_groups(model, lr=1e-3)
    st.unmerge(model)
    assert st.param_groups(model, lr=1e-3)
