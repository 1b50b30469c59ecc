"""Prefix tuning and P-tuning v2: options, the network that makes a prefix, positions, heads, encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import CapabilityError, SiteError, SlimtuneError, SpecError
from slimtune.methods.prefix_tuning import MadePrefixOp
from slimtune.testing import zoo
from slimtune.testing.subject import adapter_of
from slimtune.testing.zoo import architecture
from slimtune.train.checkpoint import read_tensors, write_tensors


def layers(report: Any) -> list[str]:
    return [row.path for row in report.rows if row.port == "attention"]


def made(model: nn.Module, name: str = "default") -> list[MadePrefixOp]:
    return [op for op in adapter_of(model, name).ops.values() if isinstance(op, MadePrefixOp)]


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        st.attach(zoo.llama(), st.PrefixTuning(p=0, hidden=-1, std=0.0, where=("middle",)))
    assert all(word in str(caught.value) for word in ("p must", "hidden must", "std must", "where takes"))


def test_merging_is_refused() -> None:
    model = zoo.llama()
    st.attach(model, st.PrefixTuning(p=2))
    with pytest.raises(CapabilityError) as caught:
        st.merge(model)
    assert caught.value.where
    assert caught.value.hint


def test_numbers_of_parameters_and_layers_differ() -> None:
    model = zoo.llama()
    report = st.attach(model, st.PrefixTuning(p=5))
    assert report.trainable == 3 * 5 * 2 * 2 * 8  # layers, p, key and value, heads, width
    keys = [op.K for op in adapter_of(model, "default").ops.values() if hasattr(op, "K")]
    assert not torch.equal(keys[0], keys[1])  # each layer draws its own
    again = zoo.llama()
    st.attach(again, st.PrefixTuning(p=5))
    assert torch.equal(next(op.K for op in adapter_of(again, "default").ops.values() if hasattr(op, "K")), keys[0])  # from the seed


# ---- the network -----------------------------------------------------------------------------------------------------
def test_the_network_is_that_of_the_formula_and_shared() -> None:
    model = zoo.llama()
    report = st.attach(model, st.PrefixTuning(p=4, hidden=6))
    ops = made(model)
    assert len({id(op.P) for op in ops}) == len({id(op.W1) for op in ops}) == 1
    d, b = 16, 2 * 2 * 8
    assert report.trainable == 4 * d + 6 * d + 6 + 3 * (6 * b + b)
    op = ops[1]
    with torch.no_grad():
        want = torch.tanh(op.P @ op.W1.T + op.b1) @ op.W2.T + op.b2  # [p, heads (width + width)]
        K, V = op.rows()
    torch.testing.assert_close(K.flatten(1), want[:, :16])
    torch.testing.assert_close(V.flatten(1), want[:, 16:])
    assert K.abs().mean() > 0.05


def test_training_the_network_goes_on_after_saving_and_from_a_checkpoint(tmp_path: Path) -> None:
    """What others read is the result; ours keeps the network, so that the next step after loading is the very same one."""
    a = architecture("Llama")
    batch = a.inputs(4)

    def step(model: nn.Module) -> list[torch.Tensor]:
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).zero_grad()
        model(**batch).logits.square().mean().backward()
        with torch.no_grad():
            for p in dict.fromkeys(p for op in made(model) for p in op.parameters()):
                assert p.grad is not None
                assert p.grad.abs().max() > 0
                p -= 0.1 * p.grad
        return [p.detach().clone() for op in made(model) for p in op.parameters()]

    model = a.build()
    st.attach(model, st.PrefixTuning(p=3, hidden=6))
    step(model)
    st.save(model, tmp_path / "saved")
    write_tensors(model, "default", tmp_path)
    want = step(model)
    loaded, resumed = a.build(), a.build()
    st.load(loaded, tmp_path / "saved", trainable=True)
    st.attach(resumed, st.PrefixTuning(p=3, hidden=6))
    read_tensors(resumed, "default", tmp_path)
    for other in (loaded, resumed):
        assert len({id(op.P) for op in made(other)}) == 1
        for got, w in zip(step(other), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-12)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING"
    assert not config["prefix_projection"]


# ---- positions -------------------------------------------------------------------------------------------------------
def test_tokens_come_after_the_prefix_and_a_full_table_is_said() -> None:
    model: Any = architecture("BERT").build()
    limit = model.config.max_position_embeddings
    st.attach(model, st.PrefixTuning(p=10, std=0.3))
    seen: list[torch.Tensor] = []
    model.bert.embeddings.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    model(torch.full((2, 5), 7))
    assert seen[0].expand(2, -1).tolist() == [[10, 11, 12, 13, 14]] * 2
    model(torch.full((1, limit - 10), 7))
    with pytest.raises(SlimtuneError, match=f"{limit} positions"):
        model(torch.full((1, limit - 9), 7))


# ---- encoder-decoders ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_where_of_an_encoder_decoder(name: str) -> None:
    a = architecture(name)
    batch = a.inputs(2)
    own = a.build()
    with torch.no_grad():
        base = a.run(own, batch)
    found: dict[str, list[str]] = {}
    for part in ("encoder", "decoder", "cross"):
        model = a.build()
        found[part] = layers(st.attach(model, st.PrefixTuning(p=3, std=0.5, where=(part,))))
        assert len(found[part]) == 2
        with torch.no_grad():
            assert (a.run(model, batch) - base).abs().max() > 1e-3
    every = layers(st.attach(a.build(), st.PrefixTuning(p=3)))
    assert sorted(every) == sorted(p for paths in found.values() for p in paths)
    with pytest.raises(SiteError, match="where="):
        st.attach(a.build(), st.PrefixTuning(targets=tuple(found["cross"]), where=("encoder",)))


# ---- P-tuning v2 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "head", "shape"),
    [
        pytest.param(lambda: zoo.bert(), "classifier", (8,), id="BERT sequences", marks=pytest.mark.slow),
        pytest.param(lambda: zoo.bert("BertForTokenClassification"), "classifier", (8, 6), id="BERT tokens"),
        pytest.param(lambda: zoo.llama("LlamaForSequenceClassification"), "score", (8,), id="Llama sequences"),
        pytest.param(lambda: zoo.llama("LlamaForTokenClassification"), "score", (8, 6), id="Llama tokens", marks=pytest.mark.slow),
        pytest.param(lambda: zoo.roberta(), "classifier", (8,), id="RoBERTa sequences", marks=pytest.mark.slow),
    ],
)
def test_p_tuning_v2_trains_prefix_and_head(make: Any, head: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    report = st.attach(model, st.PTuningV2(p=4, std=0.3))
    full = {row.path.split(".")[0] for row in report.rows if row.port == "weight"}
    assert full == {head}
    assert len(layers(report)) == model.config.num_hidden_layers
    ids, labels = torch.randint(3, 90, (8, 6)), torch.randint(0, 2, shape)
    optimiser, losses = torch.optim.Adam(st.param_groups(model, lr=0.1)), []
    for _ in range(15):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses
    st.save(model, tmp_path)
    torch.manual_seed(0)
    other = make()
    st.load(other, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


def test_p_tuning_v2_leaves_an_output_embedding_alone() -> None:
    report = st.attach(zoo.llama(), st.PTuningV2(p=4))
    assert {row.port for row in report.rows} == {"attention", "stream"}
    named = st.attach(zoo.bert(), st.PTuningV2(p=4, train_modules=("pooler.dense",)))
    assert {row.path for row in named.rows if row.port == "weight"} == {"bert.pooler.dense"}


# ---- beside other methods --------------------------------------------------------------------------------------------
def test_with_a_lora_in_a_stack_a_sum_and_rows() -> None:
    a = architecture("Llama")
    model, batch = a.build(), a.inputs(3)
    st.attach(model, st.PrefixTuning(p=3, std=0.5), name="p")
    st.attach(model, st.LoRA(r=2), name="l")
    with torch.no_grad():
        for t in adapter_of(model, "l").parameters():
            t.normal_(std=0.3)

        def out(which: Any = None, **rows: Any) -> torch.Tensor:
            with st.use(model, which, **rows), torch.no_grad():
                return a.run(model, batch)

        alone = {k: out(w) for k, w in {"p": "p", "l": "l", "both": ["p", "l"], "sum": {"p": 1.0, "l": 1.0}, None: None}.items()}
        torch.testing.assert_close(alone["both"], alone["sum"], rtol=1e-6, atol=1e-6)  # at no site do the two meet
        mixed = out(rows=["p", ["p", "l"], None])
    for i, key in enumerate(("p", "both", None)):
        torch.testing.assert_close(mixed[i], alone[key][i], rtol=1e-6, atol=1e-6)
