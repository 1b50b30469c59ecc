"""st.merge(model, keep=False): the merged model is a plain one, and costs one layer more while it is made."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, GenerationConfig, LlamaConfig, LlamaForCausalLM

import slimtune as st
from slimtune.algebra.merged_values import merged_sites
from slimtune.core.errors import MergeError
from slimtune.core.plan import Plan
from slimtune.ports.effective import effective
from slimtune.testing.cases import CASES, case
from slimtune.testing.live_bytes import LiveBytes
from slimtune.testing.subject import Subject, bits, classes, fill

MERGING = ("linear", "HF Conv1D", "conv2d", "embedding", "MultiheadAttention packed", "TransformerEncoderLayer", "experts", "LayerNorm", "nf4")
MERGING += ("int8", "group 4-bit")
IDS = torch.arange(12).view(2, 6) + 3


def llama(tie: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, vocab_size=60, tie_word_embeddings=tie, eos_token_id=2
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def plain(model: nn.Module, like: nn.Module) -> None:
    """Assert that a model has nothing of ours: classes, attributes, hooks, and the bytes of its pickle."""
    kinds = {path: type(m) for path, m in like.named_modules()}
    assert {path: type(m) for path, m in model.named_modules()} == kinds
    for (path, mine), theirs in zip(model.named_modules(), like.modules(), strict=True):
        extra = {k for k in mine.__dict__ if k not in theirs.__dict__}
        assert not extra, f"{path} has gained {extra}"
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_backward_hooks"):
            assert len(mine.__dict__[hooks]) == len(theirs.__dict__[hooks]), f"{path} keeps {hooks}"
    assert b"slim" not in pickle.dumps(model)


def subjects() -> list[Subject]:
    """Every method on every kind of module where it merges."""
    from slimtune.core.registry import spec_class
    from slimtune.testing.suite import expected_problem

    own = [method for method in st.methods() if spec_class(method).__module__.startswith("slimtune.")]  # other tests register some
    found = [Subject(spec_class(method)(), case(name)) for method in own for name in MERGING]
    return [s for s in found if not expected_problem(s)]


@pytest.mark.parametrize("s", subjects(), ids=lambda s: f"{s.spec.method}-{s.case}".replace(" ", "_"))
def test_every_method_merges_for_good_or_changes_nothing(s: Subject) -> None:
    model = s.attached("a")
    before, out, can = bits(model), s.out(model), s.can_merge(model)
    if not can:
        with pytest.raises(st.SlimtuneError):
            st.merge(model, keep=False)
        assert bits(model) == before
        s.same(s.out(model), out, "the refused merge changed the model")
        return
    twin = s.attached("a")
    st.merge(twin)
    st.merge(model, keep=False)
    s.same(s.out(model), s.out(twin), "merged for good and merged")
    assert classes(model) == classes(s.case.build())
    assert "slim" not in " ".join(name for name, _ in model.named_modules())


def test_the_merged_model_is_plain_for_whatever_asks_for_types(tmp_path: Path) -> None:
    base, model = llama(), llama()
    st.attach(model, st.LoRA(r=2, train_modules=("lm_head",)))
    st.lean(model)
    fill(model, "default")
    want = model(IDS).logits
    st.merge(model, keep=False)
    plain(model, base)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert quantized(model) == quantized(base) == 15
    again: Any = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    st.attach(model, st.LoRA(r=2))  # a new adapter finds a plain model
    st.detach(model, "default")
    plain(model, base)


def quantized(model: nn.Module) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return sum("quantized" in type(m).__module__ and type(m).__name__ == "Linear" for m in found.modules())


def peak_of(base: Any, spec: st.Spec, dtype: torch.dtype, train: bool = False) -> tuple[int, int]:
    """Return the bytes that a permanent merge takes beside the model, and those that it leaves."""
    with LiveBytes() as live:
        model = base().to(dtype)
        bare = live.now
        st.attach(model, spec)
        with torch.no_grad():
            [p.normal_() for p in model.slim_state.adapters["default"].parameters()]  # in a list: no name is left to keep one of them
        start = live.peak = live.now
        st.merge(model, keep=False)
        return live.peak - start, live.now - bare


def linears(layers: int) -> Any:
    return lambda: nn.Sequential(*[nn.Linear(128, 2048, bias=False) if i % 2 else nn.Linear(2048, 128, bias=False) for i in range(1, layers + 1)])


BY_ROWS = [st.LoRA(r=4), st.DoRA(of=st.LoRA(r=4)), st.Dense(targets="all-linear"), st.IA3(targets="all-linear", feedforward=())]


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(BY_ROWS[0], torch.float32), *((s, t) for s in BY_ROWS for t in (torch.bfloat16, torch.float16))],
    ids=lambda x: getattr(x, "method", str(x)),
)
def test_a_permanent_merge_holds_one_layer_more_than_the_model(spec: st.Spec, layers: int, dtype: torch.dtype) -> None:
    """However many layers there are. In half precision a few rows of it are there in float32, too. Nothing is left."""
    peak, left = peak_of(linears(layers), spec, dtype)
    layer = 128 * 2048 * dtype.itemsize
    rows = 0 if dtype == torch.float32 else 4 * 32 * (128 if layers == 1 else 2048) * 4
    assert layer <= peak <= layer + rows + 16384, (peak, layer)
    assert left <= 64


def test_where_rows_are_not_made_one_by_one_the_merge_holds_the_layer_twice_in_float32() -> None:
    layer = 256 * 64 * 4
    for base, spec in ((lambda: nn.Sequential(nn.Embedding(256, 64)), st.LoRA(r=4, targets=("0",))), (linears(1), st.VeRA(r=4))):
        peak, left = peak_of(base, spec, torch.bfloat16)
        size = layer if spec.method == "lora" else 128 * 2048 * 4
        assert 2 * size <= peak, peak
        assert left <= 64


@pytest.mark.parametrize("spec", BY_ROWS, ids=lambda s: s.method)
@pytest.mark.parametrize("which", ["default", ["default", "b"], {"default": 0.7, "b": -0.4}], ids=str)
def test_rows_made_one_by_one_are_those_of_the_whole(spec: st.Spec, which: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 200), nn.Linear(200, 70)).to(torch.bfloat16)
    for name in ("default", "b"):
        st.attach(base, spec, name=name)
        fill(base, name)
    if isinstance(which, dict) and spec.method == "dora":
        which = "b"
    links = Plan.of(which).segments[0][1]
    whole = [effective(m.weight.float(), None, chain, m)[0].to(torch.bfloat16) for m, _, chain in merged_sites(base, links)]
    st.merge(base, which)
    for mine, theirs in zip((base[0].weight, base[1].weight), whole, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=2**-7, atol=1e-6)  # a product of other sizes may round otherwise
        assert (mine != theirs).float().mean() < 1e-3


def test_a_merge_that_is_kept_holds_every_old_weight_until_it_is_made_final() -> None:
    with LiveBytes() as live:
        model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(6)])
        bare = live.now
        st.attach(model, st.LoRA(r=4))
        st.merge(model)
        assert live.now - bare >= 6 * 256 * 256 * 4
        st.merge(model, keep=False)
        assert live.now - bare <= 64
    assert type(model[0]) is nn.Linear


def test_a_final_merge_of_what_is_merged_must_mean_the_same_adapters() -> None:
    model = llama()
    for name in ("a", "b"):
        st.attach(model, st.LoRA(r=2, targets=("q_proj",)), name=name)
    st.merge(model, ["a", "b"])
    with pytest.raises(MergeError, match="merged already"):
        st.merge(model, "a", keep=False)
    with pytest.raises(MergeError, match=r"merged into the weights(.|\n)*keep=False"):
        st.detach(model, "a")
    st.merge(model, ["a", "b"], keep=False)
    plain(model, llama())


@pytest.mark.parametrize("which", ["a", ["a", "b"], {"a": 0.7, "b": -0.4}])
def test_several_adapters_and_plans(which: Any) -> None:
    model = llama()
    for name in ("a", "b"):
        st.attach(model, st.LoRA(r=2, targets=("q_proj", "down_proj")), name=name)
        fill(model, name)
    with st.use(model, which):
        want = model(IDS).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        st.merge(model, which, keep=False)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert any("'b' sat on it too" in str(w.message) for w in said) == (which == "a")
    plain(model, llama())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("spec", [st.LoRA(r=2, targets="lm_head"), st.Dense(targets="embed_tokens"), st.TrainableTokens(tokens=(4, 5))], ids=str)
def test_tied_weights_are_saved_and_loaded_as_they_are(spec: st.Spec, keep: bool, tmp_path: Path) -> None:
    """One of two tied weights changed: they are two from now on, in the config as well. Both changed alike: still one."""
    model = llama(tie=True)
    st.attach(model, spec)
    fill(model, "default")
    want = model(IDS).logits
    st.merge(model, keep=keep)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    alike = spec.method == "trainable_tokens"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == alike
    assert model.config.tie_word_embeddings == alike
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=1e-5)
    if keep:
        st.unmerge(model)
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_configs_of_a_merged_model_are_those_of_the_base(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = GenerationConfig(eos_token_id=[2, 7], max_new_tokens=9, do_sample=True, temperature=0.3)
    before = (model.config.to_dict(), model.generation_config.to_dict())
    st.attach(model, st.LoRA(r=2))
    st.merge(model, keep=False)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 7]


def test_a_classifier_with_its_head() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = BertForSequenceClassification(config).eval()
    st.attach(model, st.LoRA(r=2, targets=("query",), train_modules=("classifier",)))
    fill(model, "default")
    want = model(IDS).logits
    st.merge(model, keep=False)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    plain(model, BertForSequenceClassification(config))


def test_a_merge_that_cannot_be_finished_changes_nothing() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2))
    fill(model, "default")
    last: Any = list(model.slim_state.adapters["default"].ops.values())[-1]
    with torch.no_grad():
        last.B[0, 0] = float("nan")
    before = bits(model)
    for call in ({"keep": False}, {"keep": True}):
        with pytest.raises(MergeError, match="NaN or infinite"):
            st.merge(model, **call)
        assert bits(model) == before
        assert model.slim_state.adapters


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_nothing_that_is_not_finite_is_merged_or_written(bad: float, tmp_path: Path) -> None:
    """Also what is finite in the adapter and too large for the base's type."""
    model = llama(dtype=torch.float16)
    st.attach(model, st.LoRA(r=2, targets=("q_proj",)))
    op: Any = next(iter(model.slim_state.adapters["default"].ops.values()))
    with torch.no_grad():
        op.A.fill_(1.0)
        op.B[3] = bad
    with pytest.raises(MergeError, match=r"64 of|32 of|too large|NaN") as found:
        st.merge(model)
    assert "q_proj" in found.value.where
    out = tmp_path / "out"
    with pytest.raises(MergeError):
        st.merge(model, out=out)
    assert not out.exists()
    assert all(bool(p.isfinite().all()) for n, p in model.named_parameters() if "slim" not in n)


def test_what_was_not_finite_in_the_base_may_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("-inf")
    st.attach(model, st.LoRA(r=2))
    st.merge(model, keep=False)
    assert int((~model[0].weight.isfinite()).sum()) == 1


def test_out_and_keep_do_not_go_together(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2))
    with pytest.raises(MergeError, match="plain"):
        st.merge(model, out=tmp_path / "x", keep=False)


def test_the_cases_are_real() -> None:
    assert set(MERGING) <= {c.name for c in CASES}
    assert sum(s.can_merge(s.attached("a")) for s in subjects()) > 60
    assert isinstance(IDS, Tensor)


@pytest.mark.parametrize("keep", [True, False])
def test_a_bias_that_is_not_finite_leaves_the_weight_as_it_was(keep: bool) -> None:
    """After peft 3689, 3705: the weight was written before the bias was looked at."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    st.attach(model, st.LoRA(r=2, up_bias=True))
    fill(model, "default")
    op: Any = model.slim_state.adapters["default"].ops["1", "weight"]
    with torch.no_grad():
        op.up_bias[0] = float("nan")
    before = bits(model)
    with pytest.raises(MergeError, match="NaN") as found:
        st.merge(model, keep=keep)
    assert "1.bias" in found.value.where
    assert bits(model) == before
    assert not model.slim_state.merged
