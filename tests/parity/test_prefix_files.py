"""Prefix tuning files in both directions with the reference library: outputs equal to 1e-5, and what cannot go over says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from pairs import bert, config_in, gpt2, llama, ours_and_back, output, shake, t5, theirs_and_back
from torch import nn

import slimtune as st
from slimtune.core.errors import FormatError, MismatchError


def t5_three() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, vocab_size=13, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bert_tokens() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=13, max_position_embeddings=16, num_labels=3
    )
    return transformers.BertForTokenClassification(config).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{s}_{what}": n for s in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(d_model=16, vocab_size=13, max_position_embeddings=32, **sizes)).eval()


THEIRS = {
    "Llama, fewer key heads": (llama, {"task_type": "CAUSAL_LM"}),
    "GPT-2": (gpt2, {"task_type": "CAUSAL_LM"}),
    "sequence classification": (bert, {"task_type": "SEQ_CLS"}),
    "token classification": (bert_tokens, {"task_type": "TOKEN_CLS"}),
    "encoder-decoder": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "encoder-decoder, odd": (t5_three, {"task_type": "SEQ_2_SEQ_LM"}),
    "from a network": (llama, {"task_type": "CAUSAL_LM", "prefix_projection": True, "encoder_hidden_size": 6}),
    "zero at the start": (gpt2, {"task_type": "CAUSAL_LM", "init_weights": "zero"}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_and_back(case: str, tmp_path: Path) -> None:
    make, options = THEIRS[case]
    theirs_and_back(make, peft.PrefixTuningConfig(num_virtual_tokens=3, **options), tmp_path)


OURS = {
    "Llama": (llama, st.PrefixTuning(p=3)),
    "Llama, network": (llama, st.PrefixTuning(p=3, hidden=5)),
    "GPT-2": (gpt2, st.PrefixTuning(p=2)),
    "P-tuning v2, sequences": (bert, st.PTuningV2(p=3)),
    "P-tuning v2, tokens": (bert_tokens, st.PTuningV2(p=3)),
    "T5's decoder, odd": (t5_three, st.PrefixTuning(p=3, where=("decoder",))),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_and_back(case: str, tmp_path: Path) -> None:
    make, spec = OURS[case]
    ours_and_back(make, spec, tmp_path, "PREFIX_TUNING")


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (llama, st.PrefixTuning(p=3, layers="last:1")),
        (t5, st.PrefixTuning(p=3)),
        (t5, st.PrefixTuning(p=3, where=("decoder",))),  # an even number of layers: the reference gives two of them the same
        (bart, st.PrefixTuning(p=3, where=("decoder",))),
    ],
    ids=["some layers", "encoder, too", "layers that differ", "positions that stay"],
)
def test_what_the_reference_cannot_hold_has_a_layout_of_our_own(make: Any, spec: st.Spec, tmp_path: Path) -> None:
    live = make()
    st.attach(live, spec, name="mine")
    shake(live.parameters())
    with torch.no_grad():
        want = output(live) if make is not bart else live(torch.arange(6)[None]).logits
    st.save(live, tmp_path)
    assert config_in(tmp_path)["peft_type"] == "SLIMTUNE_PREFIX_TUNING"
    other = make()
    st.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(output(other) if make is not bart else other(torch.arange(6)[None]).logits, want)


def test_files_for_other_bases_are_refused(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(str(tmp_path / "llama"))
    with pytest.raises(MismatchError, match="3 attention layers"):
        st.load(gpt2(), tmp_path / "llama")
    peft.get_peft_model(bart(), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).save_pretrained(str(tmp_path / "bart"))
    with pytest.raises(MismatchError, match="position_ids"):
        st.load(bart(), tmp_path / "bart")
    wide = tmp_path / "wide"
    peft.get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, vocab_size=13, num_hidden_layers=3)),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ).save_pretrained(str(wide))
    with pytest.raises(MismatchError, match="prompt_embeddings"):
        st.load(llama(), wide)


def test_hostile_configs_are_one_error(tmp_path: Path) -> None:
    peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(str(tmp_path))
    good = (tmp_path / "adapter_config.json").read_text()
    bad = {'"num_virtual_tokens": 3': '"num_virtual_tokens": -3', '"num_layers": 3': '"num_layers": "all"', '"PREFIX_TUNING"': '"PREFIX"'}
    for old, new in bad.items():
        (tmp_path / "adapter_config.json").write_text(good.replace(old, new))
        with pytest.raises(FormatError):
            st.load(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(good.replace('"num_virtual_tokens": 3', '"num_virtual_tokens": 4'))
    with pytest.raises(MismatchError):
        st.load(llama(), tmp_path)
