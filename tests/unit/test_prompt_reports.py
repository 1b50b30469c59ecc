"""Public reports about prompts, prefixes, caches and positions, each as a small case (docs/faults.md names them)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import slimtune as st
from slimtune.testing.cases import rescale
from slimtune.testing.subject import fill

IDS = torch.tensor([[17, 8, 31, 44, 12], [5, 71, 33, 12, 90]])
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def qwen3() -> Any:
    """Heads that are wider than the hidden size divided by their number."""
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL))


def gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=64))


def made(build: Any, spec: st.Spec) -> Any:
    torch.manual_seed(2)
    model = rescale(build()).double().eval()
    st.attach(model, spec)
    fill(model, "default", 0.5)
    return model


@pytest.mark.parametrize("build", [qwen2, qwen3, gemma3])
@pytest.mark.parametrize("spec", [st.PromptTuning(tokens=3), st.PrefixTuning(p=3), st.PTuning(tokens=3, hidden=8)], ids=lambda s: type(s).__name__)
def test_generating_with_a_cache_gives_what_it_gives_without(build: Any, spec: st.Spec) -> None:
    """peft 2123, 2379, 2881, 2540, 1901: virtual tokens ignored with a cache, or a shape error with fewer or wider key heads."""
    model = made(build, spec)
    common: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS, **common, use_cache=False)
    for extra in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(IDS, **common, **extra), want)
    with torch.no_grad():
        acting = model(IDS).logits
        with st.use(model, None):
            assert (model(IDS).logits - acting).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_prefixes_train_under_checkpointing_as_without(reentrant: bool) -> None:
    """peft 869, 2191: a prefix kept in a cache grows, or is refused, when blocks are computed twice."""
    grads = []
    for checkpointed in (False, True):
        model = made(qwen2, st.PrefixTuning(p=3)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("spec", [st.PromptTuning(tokens=3), st.PrefixTuning(p=3)], ids=lambda s: type(s).__name__)
def test_padding_on_the_left_changes_nothing(spec: st.Spec) -> None:
    """peft 54: [virtual, pad, text] puts the pads between a prompt and its text, and moves positions."""
    model = made(qwen2, spec)
    padded, mask = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    padded[0, 3:], padded[1, 3:], mask[:, 3:] = IDS[0], IDS[1], 1
    with torch.no_grad():
        assert torch.allclose(model(padded, attention_mask=mask).logits[:, 3:], model(IDS).logits, atol=1e-9)
    common: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(padded, attention_mask=mask, **common)[:, 8:], model.generate(IDS, **common)[:, 5:])


def test_the_pooled_mask_has_the_length_of_the_tokens() -> None:
    """sentence-transformers 3000: pooling after a prompt had a longer output than its mask."""
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=99, max_position_embeddings=16
    )
    model = transformers.BertModel(config).eval()
    st.attach(model, st.PromptTuning(tokens=3))
    assert model(IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state.shape[:2] == IDS.shape
