"""The attention port: extra keys and values of every layer, against a filled cache, the formula by the book, and each row alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import slimtune as st
from slimtune.core.errors import CapabilityError, SiteError, SlimtuneError
from slimtune.ports.attend import AttendKind, extended, refuse
from slimtune.testing import zoo
from slimtune.testing.subject import adapter_of
from slimtune.testing.textbook import _moved, by_the_book
from slimtune.testing.zoo import Architecture, architecture

SLOW = pytest.mark.slow
REACHED = ["Llama", "Gemma-3", "BERT", "T5", "ViT", "Whisper", "nn.TransformerEncoder"]
REACHED_TOO = ["Qwen3", "Mistral", "Mixtral", "GPT-2", "DistilBERT", "ModernBERT", "BART", "DINOv2", "CLIP", "wav2vec2", "LLaVA"]
REFUSED = {"BLOOM": "BloomAttention", "Falcon": "FalconAttention", "DeBERTa-v2": "DisentangledSelfAttention", "DiT": "Attention",
           "UNet2DCondition": "Attention", "nn.Sequential (MLP)": "Sequential"}  # fmt: skip


def prefix(p: int = 3, **options: Any) -> st.Spec:
    return st.PrefixTuning(p=p, std=0.5, **options)


def run(a: Architecture, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return a.run(model, batch)


def placed(model: nn.Module, port: str, name: str = "default") -> dict[nn.Module, Any]:
    return {model.get_submodule(path): op for (path, _), op in adapter_of(model, name).ops.items() if op.port == port}


# ---- against what the libraries themselves do ------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_to_a_filled_cache(attention: str) -> None:
    """Keys and values stand where a cache would have them, to the last bit; tokens take the positions after them."""
    model: Any = architecture("Llama").build()
    model.set_attn_implementation(attention)
    st.attach(model, prefix(4))
    ids = torch.randint(3, 90, (3, 6))
    pairs = [tuple(t.transpose(0, 1)[None].expand(3, -1, -1, -1) for t in op.rows()) for op in placed(model, "attention").values()]
    with torch.no_grad():
        got = model(ids).logits
        with st.disabled(model):
            want, base = model(ids, past_key_values=DynamicCache(pairs)).logits, model(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (got - base).abs().max() > 0.1


@pytest.mark.parametrize("name", [*REACHED, *(pytest.param(n, marks=SLOW) for n in REACHED_TOO)])
def test_every_architecture_by_the_book(name: str) -> None:
    """Forward, mixed rows of other lengths or none, and a row alone, with padding, in every family that asks the registry."""
    a = architecture(name)
    model, batch = a.build(), a.inputs(4)
    base = run(a, model, batch)
    st.attach(model, prefix())
    got = run(a, model, batch)
    pairs = {m: op.rows() for m, op in placed(model, "attention").items()}
    with st.disabled(model), _moved(list(placed(model, "stream").items())), by_the_book(model, pairs):
        want = run(a, model, batch)
    torch.testing.assert_close(got, want, rtol=a.rtol, atol=a.rtol)
    assert (got - base).abs().max() > 1e-2, "the prefix does nothing"
    st.attach(model, prefix(2, seed=1), name="b")
    plan = ["default", None, "b", ["b", "default"]]
    with st.use(model, rows=plan):
        mixed = run(a, model, batch)
    for i, which in enumerate(plan):
        with st.use(model, which):
            alone = run(a, model, a.one(batch, i))
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=a.rtol, atol=a.rtol)


@pytest.mark.parametrize("name", REFUSED)
def test_models_with_attention_of_their_own_are_refused_by_name(name: str) -> None:
    model = architecture(name).build()
    with pytest.raises(SlimtuneError) as caught:
        st.attach(model, prefix())
    assert REFUSED[name] in str(caught.value)
    assert caught.value.where
    assert caught.value.hint
    assert "slim_state" not in model.__dict__


@pytest.mark.parametrize("name", ["Llama", "T5", *(pytest.param(n, marks=SLOW) for n in ("Gemma-3", "GPT-2", "BART", "Whisper", "LLaVA"))])
def test_generate(name: str) -> None:
    """No cache, a growing one, a static one and beams write the same; rows of a batch, left-padded, as each alone."""
    a = architecture(name)
    model: Any = a.build()
    model.generation_config.eos_token_id = None
    st.attach(model, prefix())
    st.attach(model, prefix(2, seed=1), name="b")
    st.use(model, "default")
    given = {k: v for k, v in a.inputs(2).items() if k in a.prompt}
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(**given, **how, use_cache=False)
    assert torch.equal(model.generate(**given, **how), want)
    assert torch.equal(model.generate(**given, **how, cache_implementation="static", disable_compile=True), want)
    assert torch.equal(model.generate(**given, **how, num_beams=3), model.generate(**given, **how, num_beams=3, use_cache=False))
    with st.disabled(model):
        assert not torch.equal(model.generate(**given, **how), want)
    with st.use(model, rows=["b", None]):
        mixed, beams = model.generate(**given, **how), model.generate(**given, **how, num_beams=2)
    for i, which in enumerate(("b", None)):
        one = {k: v[i : i + 1] for k, v in given.items()}
        with st.use(model, which):
            assert torch.equal(model.generate(**one, **how)[0], mixed[i])
            assert torch.equal(model.generate(**one, **how, num_beams=2)[0], beams[i])


# ---- what is in use underneath ---------------------------------------------------------------------------------------
def test_any_function_of_the_registry_is_wrapped_whenever_it_changes() -> None:
    a = architecture("Llama")
    model: Any = a.build()
    batch = a.inputs(2)
    st.attach(model, prefix())
    names, outs = ("eager", "sdpa", "eager"), []
    for name in names:
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name  # what the model tests for stays true
        outs.append(run(a, model, batch))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)  # eager's softmax is float32 in any model
    assert torch.equal(outs[2], outs[0])


@pytest.mark.parametrize("first", ["lean", "attach"])
def test_lean_in_either_order(first: str) -> None:
    """In bfloat16 and training, where the lean kernel itself runs, with gradients near those of torch's own."""
    a = architecture("Llama")
    found = []
    for lean in (False, True):
        model: Any = a.build().bfloat16()
        if lean and first == "lean":
            st.lean(model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            st.attach(model, prefix())
        if lean and first == "attach":
            st.lean(model)
        model.train()
        out = model(**a.inputs(4)).logits.float()
        out.square().mean().backward()
        found.append((out.detach(), [p.grad for p in adapter_of(model, "default").parameters()]))
        if lean:
            st.unlean(model)
            torch.testing.assert_close(model(**a.inputs(4)).logits.float(), found[0][0], rtol=0, atol=0)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.05, atol=0.1)
    for g, w in zip(found[1][1], found[0][1], strict=True):
        assert (g - w).norm() < 0.1 * w.norm()


def test_other_models_and_detached_ones_are_as_before() -> None:
    a = architecture("BERT")
    batch = a.inputs(2)
    want = run(a, a.build(), batch)
    model = a.build()
    st.attach(model, prefix())
    assert torch.equal(run(a, a.build(), batch), want)
    st.detach(model, "default")
    assert torch.equal(run(a, model, batch), want)
    assert [type(m) for m in model.modules()] == [type(m) for m in a.build().modules()]


@pytest.mark.slow
def test_a_pickled_model_acts_in_a_new_process(tmp_path: Any) -> None:
    a = architecture("Llama")
    model: Any = a.build()
    st.attach(model, prefix())
    ids = torch.tensor([[5, 6, 7]])
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, ids)))
    code = f"import pickle; m, i = pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb')); print(m(i).logits.sum().item())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(model(ids).logits.sum().item(), rel=1e-9)


def test_a_layer_that_does_not_ask_is_an_error_not_a_silent_nothing() -> None:
    """GPT-2 with upcast attention under "eager" computes it in its own code."""
    a = architecture("GPT-2")
    model: Any = a.build().float()  # the only type that it can be computed in
    st.attach(model, prefix())
    for m in model.modules():
        if hasattr(m, "reorder_and_upcast_attn"):
            m.reorder_and_upcast_attn = True
    run(a, model, a.inputs(2))
    model.set_attn_implementation("eager")
    with pytest.raises(SiteError, match="without asking"):
        run(a, model, a.inputs(2))
    with st.disabled(model):
        run(a, model, a.inputs(2))


def test_functions_that_cannot_see_wider_keys_are_refused() -> None:
    slot: Any = type("Slot", (), {"path": "layer"})()
    cases: list[Any] = [("flex_attention", object(), {}), ("paged|sdpa", None, {"cache": 1}), ("flash_attention_2", None, {"sliding_window": 4})]
    for name, mask, kwargs in cases:
        with pytest.raises(CapabilityError, match="no place"):
            refuse(slot, name, nn.Linear(1, 1), mask, kwargs)
    refuse(slot, "flash_attention_2", nn.Linear(1, 1), None, {})


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_masks_get_columns_on_the_left() -> None:
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    none = torch.tensor([[False, True], [False, False]])
    assert extended(None, layer, "sdpa", q, k, 2, None, None) is None
    assert extended(None, layer, "eager", q, k, 2, None, True) is None  # eager gets its causal mask from the model
    assert extended(None, layer, "flash_attention_2", q, k, 2, None, True) is None  # which counts from the right
    causal = extended(None, layer, "sdpa", q, k, 2, None, True)
    assert causal is not None
    assert causal[0, 0].tolist() == [[True, True, *(j <= i for j in range(5))] for i in range(3)]
    rows = extended(None, layer, "sdpa", q, k, 2, none, None)
    assert rows is not None
    assert rows[:, 0, 0, :2].tolist() == none.tolist()
    assert rows[..., 2:].all()
    added = extended(None, layer, "eager", q, k, 2, none, None)
    assert added is not None
    assert added[0, 0, 0, 0] == torch.finfo(q.dtype).min
    assert added[0, 0, 0, 1:].abs().max() == 0
    flat = extended(torch.ones(2, 5, dtype=torch.long), layer, "flash_attention_2", q, k, 2, none, True)
    assert flat is not None
    assert flat.tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    given = torch.zeros(1, 1, 3, 7)  # longer than the keys, as some models keep it
    wider = extended(given, layer, "eager", q, k, 2, none, None)
    assert wider is not None
    assert wider.shape == (2, 1, 3, 7)


# ---- places ----------------------------------------------------------------------------------------------------------
def test_targets_layers_and_exclude() -> None:
    model = zoo.llama()
    assert [r.path for r in st.attach(model, prefix(layers="last:1")).rows if r.port == "attention"] == ["model.layers.2.self_attn"]
    st.detach(model, "default")
    report = st.attach(model, prefix(targets=("self_attn",), exclude=("layers.0",)))
    assert [r.path for r in report.rows if r.port == "attention"] == ["model.layers.1.self_attn", "model.layers.2.self_attn"]


def test_heads_that_a_layer_tells_are_those_it_has() -> None:
    """Every layer of the zoo says right how many heads its keys have, and how wide: its forward is the judge."""
    kind = AttendKind()
    for name, want in (("Llama", (2, 8)), ("Gemma-3", (2, 8)), ("GPT-2", (4, 8)), ("BERT", (4, 8)), ("T5", (4, 8)), ("ViT", (4, 8))):
        model = architecture(name).build()
        said = {kind.key_value(m)[:2] for m in model.modules() if kind.fits(m)}
        assert said == {want}, name


def test_output_ops_and_prefixes_on_one_layer() -> None:
    """Both ports of an attention layer at once."""
    a = architecture("BERT")
    model, batch = a.build(), a.inputs(2)
    st.attach(model, prefix())
    one = run(a, model, batch)
    st.attach(model, st.Bottleneck(targets=("attention.self",), reduction=4), name="b")
    with torch.no_grad():
        for p in adapter_of(model, "b").parameters():
            p.normal_(std=0.3)
    two = run(a, model, batch)
    with st.use(model, ["default", "b"]):
        both = run(a, model, batch)
    assert min((both - one).abs().max(), (both - two).abs().max()) > 1e-3
    with st.use(model, rows=[["default", "b"], "b"]):
        mixed = run(a, model, batch)
    torch.testing.assert_close(mixed[:1], both[:1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixed[1:], two[1:], rtol=1e-9, atol=1e-9)


def test_sums_of_different_lengths_are_refused() -> None:
    a = architecture("ViT")
    model, batch = a.build(), a.inputs(2)
    st.attach(model, prefix(3))
    st.attach(model, prefix(2), name="b")
    with st.use(model, {"default": 0.5, "b": 0.5}), pytest.raises(CapabilityError, match="different lengths") as caught:
        run(a, model, batch)
    assert "stack" in caught.value.hint


def test_multihead_attention_with_masks_and_weights() -> None:
    """torch's own module: masks hide tokens, never the prefix; weights are those of the tokens, as the whole softmax gives them."""
    torch.manual_seed(0)
    box = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)).eval()
    st.attach(box, prefix(3, targets=("0",)))
    x, late = torch.randn(2, 4, 8, dtype=torch.float64), torch.ones(4, 4, dtype=torch.bool).triu(1)
    hidden = torch.tensor([[False] * 4, [False, False, True, True]])
    y, w = box[0](x, x, x, attn_mask=late, key_padding_mask=hidden)
    z, none = box[0](x, x, x, attn_mask=torch.zeros(4, 4).double().masked_fill(late, -torch.inf), key_padding_mask=hidden, need_weights=False)
    torch.testing.assert_close(y, z)
    assert none is None
    assert w.shape == (2, 4, 4)
    assert (w.sum(-1) < 1).all()
    assert w[1, 3, 2] == 0
    assert w[0, 0, 1] == 0
    one, _ = box[0](x[0], x[0], x[0], attn_mask=late)
    torch.testing.assert_close(one, y[0])
