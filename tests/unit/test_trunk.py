"""The trunk cache: the same bits as without it, and never a stale or random trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import slimtune as st


def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, **shape))


def bert(**dropout: float) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 60}
    return BertForSequenceClassification(BertConfig(**shape, **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | dropout))


def batch(left: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, :3 if left else None] = 0 if left else 1
    if not left:
        mask[1, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def ran(model: nn.Module, stack: str) -> tuple[list[int], list[Any]]:
    """Count how often the attention of each block runs."""
    counts: list[int] = []
    hooks = []
    for i, block in enumerate(model.get_submodule(stack)):
        counts.append(0)
        attention = next(m for n, m in block.named_modules() if n in {"self_attn", "attention"})

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        hooks.append(attention.register_forward_hook(count))
    return counts, hooks


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_hit_gives_the_same_bits_and_skips_the_blocks(left: bool, where: str, tmp_path: Path) -> None:
    model = llama().train()
    st.attach(model, st.LoRA(r=2, layers="last:1"))
    inputs = batch(left)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    want = model(**inputs, labels=labels)
    want.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    counts, _ = ran(model, "model.layers")
    with_cache = st.cache_trunk(model, folder=tmp_path if where == "disk" else None)
    for times in (1, 1, 1):
        model.zero_grad()
        got = model(**inputs, labels=labels)
        got.loss.backward()
        real = inputs["attention_mask"].bool()
        assert torch.equal(got.logits[real], want.logits[real])
        assert torch.equal(got.loss, want.loss)
        assert all(torch.equal(p.grad, g) for p, g in zip((p for p in model.parameters() if p.grad is not None), grads, strict=True))
        assert counts[0] == times, "the trunk ran again"
    assert counts == [1, 1, 1, 3]
    assert (with_cache.hits, with_cache.misses) == (6, 3)
    with_cache.close()
    model(**inputs)
    assert counts == [2, 2, 2, 4]
    assert type(model.model.layers[0]).__mro__[1].__name__ != "TrunkBlock"


def test_rows_are_found_in_other_batches() -> None:
    model = bert().train()
    st.attach(model, st.LoRA(r=2, layers="last:2"))
    inputs = batch()
    counts, _ = ran(model, "bert.encoder.layer")
    st.cache_trunk(model)
    model(**inputs)
    flipped = {k: v.flip(0) for k, v in inputs.items()}
    got = model(**flipped)
    assert counts == [1, 1, 2, 2]
    with st.disabled(model):
        pass
    fresh = bert().train()
    st.attach(fresh, st.LoRA(r=2, layers="last:2"))
    torch.testing.assert_close(got.logits, fresh(**flipped).logits)


def test_a_run_that_comes_later_finds_the_file(tmp_path: Path) -> None:
    inputs = batch()
    for times in (1, 0):
        model = llama()
        st.attach(model, st.LoRA(r=2, layers="last:1"))
        counts, _ = ran(model, "model.layers")
        cache = st.cache_trunk(model, folder=tmp_path)
        model(**inputs)
        assert counts[0] == times
        cache.close()
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.01)
    st.attach(other, st.LoRA(r=2, layers="last:1"))
    counts, _ = ran(other, "model.layers")
    st.cache_trunk(other, folder=tmp_path)
    other(**inputs)
    assert counts[0] == 1, "another base must not find it"


def test_a_cut_off_file_is_no_harm(tmp_path: Path) -> None:
    inputs = batch()
    model = llama()
    st.attach(model, st.LoRA(r=2, layers="last:1"))
    want = model(**inputs).logits
    cache = st.cache_trunk(model, folder=tmp_path)
    model(**inputs)
    cache.close()
    (data,) = tmp_path.rglob("trunk.bin")
    data.write_bytes(data.read_bytes()[:-7])
    cache = st.cache_trunk(model, folder=tmp_path)
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], want[real])
    assert cache.misses == 3


def test_a_changed_trunk_is_computed_again() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2, layers="last:1"))
    inputs = batch()
    st.cache_trunk(model)
    before = model(**inputs).logits
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert not torch.allclose(model(**inputs).logits, before)


def test_another_plan_goes_past_the_cache() -> None:
    model = llama().eval()
    st.attach(model, st.LoRA(r=2, layers="last:1"), name="high")
    st.attach(model, st.LoRA(r=2, init="gaussian"), name="all")
    with torch.no_grad():
        for p in model.slim_state.adapter("all").parameters():
            p.add_(0.1)
    inputs = batch()
    st.use(model, "all")
    want = model(**inputs).logits
    st.use(model, "high")
    cache = st.cache_trunk(model)
    model(**inputs)
    model(**inputs)
    assert cache.hits == 3
    with st.use(model, "all"):
        assert torch.equal(model(**inputs).logits, want)
    assert cache.hits == 3


def test_records_and_generation_go_past_the_cache() -> None:
    model = llama().eval()
    st.attach(model, st.LoRA(r=2, layers="last:1"))
    inputs = batch()
    want = model(**inputs, output_hidden_states=True).hidden_states
    text = model.generate(**batch(left=True), max_new_tokens=3, do_sample=False)
    st.cache_trunk(model)
    for _ in range(2):
        model(**inputs)
    for a, b in zip(model(**inputs, output_hidden_states=True).hidden_states, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.generate(**batch(left=True), max_new_tokens=3, do_sample=False), text)


def test_the_limit_holds() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2, layers="last:1"))
    one = 8 * 32 * 4
    cache = st.cache_trunk(model, limit=(one + 10) / 2**30)
    model(**batch())
    model(**batch())
    assert cache.store.bytes == one  # type: ignore[attr-defined]
    assert cache.hits == 0


@pytest.mark.parametrize("reason", ["all layers", "dropout", "encoder-decoder", "embedding", "trains"])
def test_what_cannot_be_cached_is_refused(reason: str) -> None:
    model: Any = bert(hidden_dropout_prob=0.1) if reason == "dropout" else llama()
    spec = st.LoRA(r=2, layers="last:1")
    if reason == "all layers":
        spec = st.LoRA(r=2)
    if reason == "encoder-decoder":
        model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=3, num_heads=2, d_kv=8, dropout_rate=0.0))
    if reason == "embedding":
        spec = st.LoRA(r=2, targets=("embed_tokens", "lm_head"))
    st.attach(model, spec)
    if reason == "trains":
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(st.SlimtuneError) as caught:
        st.cache_trunk(model)
    assert caught.value.where
    assert caught.value.hint
