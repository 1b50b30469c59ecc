"""Targets: what each role means on each architecture, and errors that help."""

import re

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import SpecError, TargetError
from slimtune.core.targets import candidates, find_modules, heads, kind_of, matches
from slimtune.testing import zoo as tiny
from slimtune.testing.zoo import VOCAB

LINEAR = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
BERT = {"q": {"query"}, "k": {"key"}, "v": {"value"}, "o": {"attention.output.dense"}, "up": {"intermediate.dense"}, "down": {"output.dense"}}
BART = {"q": {"q_proj"}, "k": {"k_proj"}, "v": {"v_proj"}, "o": {"out_proj"}, "up": {"fc1"}, "down": {"fc2"}, "head": {"lm_head"}}
FUSED = {"qkv": {"query_key_value"}, "o": {"self_attention.dense"}, "up": {"dense_h_to_4h"}, "down": {"dense_4h_to_h"}, "head": {"lm_head"}}
LLAMA = {
    "q": {"q_proj"}, "k": {"k_proj"}, "v": {"v_proj"}, "o": {"o_proj"}, "gate": {"gate_proj"}, "up": {"up_proj"}, "down": {"down_proj"},
    "head": {"lm_head"},
}  # fmt: skip
VIT = {"q": {"q_proj"}, "k": {"k_proj"}, "v": {"v_proj"}, "o": {"o_proj"}, "up": {"fc1"}, "down": {"fc2"}, "head": {"classifier"}}
DIFFUSION = {"q": {"to_q"}, "k": {"to_k"}, "v": {"to_v"}, "o": {"to_out.0"}, "up": {"ff.net.0.proj"}, "down": {"ff.net.2"}}
# The layers of DINOv2 have ViT's names in later versions of transformers.
NEW_NAMES = any(path.endswith("attention.q_proj") for path, _ in tiny.dinov2().named_modules())
MEANT = {  # the ends of the paths each role must match; a role that is not named must match nothing
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA,
    "mistral": LLAMA,
    "mixtral": {"q": {"q_proj"}, "k": {"k_proj"}, "v": {"v_proj"}, "o": {"o_proj"}, "head": {"lm_head"}, "experts": {"mlp.experts"}},
    "gpt2": {"qkv": {"c_attn"}, "o": {"attn.c_proj"}, "up": {"c_fc"}, "down": {"mlp.c_proj"}, "head": {"lm_head"}},
    "bloom": FUSED,
    "falcon": FUSED,
    "bert": BERT | {"head": {"classifier"}},
    "roberta": BERT | {"head": {"classifier.dense", "classifier.out_proj"}},
    "distilbert": {
        "q": {"q_lin"}, "k": {"k_lin"}, "v": {"v_lin"}, "o": {"out_lin"}, "up": {"lin1"}, "down": {"lin2"},
        "head": {"classifier", "pre_classifier"},
    },
    "deberta": BERT | {"q": {"query_proj"}, "k": {"key_proj"}, "v": {"value_proj"}, "head": {"classifier", "pooler.dense"}},
    "modernbert": {"qkv": {"Wqkv"}, "o": {"attn.Wo"}, "up": {"mlp.Wi"}, "down": {"mlp.Wo"}, "head": {"classifier", "head.dense"}},
    "t5": {
        "q": {"Attention.q"}, "k": {"Attention.k"}, "v": {"Attention.v"}, "o": {"Attention.o"}, "up": {"DenseReluDense.wi"},
        "down": {"DenseReluDense.wo"}, "head": {"lm_head"},
    },
    "bart": BART,
    "vit": VIT,
    "dinov2": VIT if NEW_NAMES else VIT | {"q": {"query"}, "k": {"key"}, "v": {"value"}, "o": {"attention.output.dense"}},
    "whisper": BART | {"head": {"proj_out"}},
    "clip": {role: ends for role, ends in BART.items() if role != "head"},
    "wav2vec2": BART | {"up": {"intermediate_dense"}, "down": {"output_dense"}},
    "llava": LLAMA | {"o": {"o_proj", "out_proj"}, "up": {"up_proj", "fc1"}, "down": {"down_proj", "fc2"}},
    "unet": DIFFUSION,
    "dit": DIFFUSION | {"head": {"proj_out_2"}},
    "flux": {
        "q": {"to_q", "add_q_proj"}, "k": {"to_k", "add_k_proj"}, "v": {"to_v", "add_v_proj"}, "o": {"to_out.0", "to_add_out"},
        "up": {"ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp"}, "down": {"ff.net.2", "ff_context.net.2", "blocks.0.proj_out"},
        "head": {"proj_out"},
    },
    "vae": {role: DIFFUSION[role] for role in ("q", "k", "v", "o")},
}  # fmt: skip


def linears(model: nn.Module, role: str) -> set[str]:
    out = heads(model)
    found = {p for p, m in candidates(model).items() if matches(role, p, m, out)}
    return {p for p in found if kind_of(model.get_submodule(p)).name in {"linear", "experts"}}


@pytest.mark.parametrize("name", MEANT)
def test_roles(name: str) -> None:
    model = getattr(tiny, name)()
    meant = MEANT[name]
    covered: set[str] = set()
    for role in (*LINEAR, "experts", "head"):
        hit = linears(model, role)
        ends = meant.get(role, set())
        assert bool(hit) == bool(ends), f"{role}: {sorted(hit)}"
        assert all(p.endswith(tuple(ends)) for p in hit), f"{role}: {sorted(hit)}"
        assert all(any(p.endswith(e) for p in hit) for e in ends), f"{role}: {sorted(hit)} lacks one of {ends}"
        assert not covered & hit, f"{role} overlaps another role: {covered & hit}"
        covered |= hit
    assert linears(model, "attention") == set().union(*(linears(model, r) for r in LINEAR[:5]))
    assert linears(model, "mlp") == set().union(*(linears(model, r) for r in LINEAR[5:]))
    every = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    routers = {p for p in every if "router" in p or p.endswith("mlp.gate")}
    assert linears(model, "all-linear") == every - linears(model, "head") - routers
    stray = linears(model, "all-linear") - covered
    known = r"pooler|pos_(key|query)_proj|projection|projector|linear_[12]$|time_emb_proj|norm.*\.linear$|_embedder$|proj_out_1"
    assert all(re.search(known, p) for p in stray), f"linear layers without a role: {stray}"


@pytest.mark.parametrize("name", MEANT)
def test_norms_and_embeddings(name: str) -> None:
    model = getattr(tiny, name)()
    out = heads(model)
    norms = {p for p, m in model.named_modules() if "norm" in type(m).__name__.lower() and list(m.parameters(recurse=False)) and p not in out}
    assert norms == {p for p, m in candidates(model).items() if matches("norm", p, m, out) and kind_of(m).names(m)}
    tables = {p: m for p, m in candidates(model).items() if matches("embedding", p, m, out)}
    if name not in {"clip", "wav2vec2", "unet", "dit", "flux", "vae"}:  # they do not tell, or have none
        words = model.get_input_embeddings()
        assert any(m is words for m in tables.values()) or not isinstance(words, nn.Embedding)
    assert all(m.num_embeddings >= VOCAB or "class_embedder" in p for p, m in tables.items()), f"these are no tables of tokens: {list(tables)}"


def test_gated_t5() -> None:
    model = tiny.t5(gated=True)
    assert {p.split(".")[-1] for p in linears(model, "gate")} == {"wi_0"}
    assert {p.split(".")[-1] for p in linears(model, "up")} == {"wi_1"}


def test_patterns() -> None:
    model = tiny.llama()
    for targets, wanted in {
        "q_proj": r"model\.layers\.\d\.self_attn\.q_proj",
        "self_attn.q_proj": r"model\.layers\.\d\.self_attn\.q_proj",
        ("q_proj", "mlp.up_proj"): r"model\.layers\.\d\.(self_attn\.q_proj|mlp\.up_proj)",
        "*.layers.0.*proj": r"model\.layers\.0\..*proj",
        "layers.1.mlp.*": r"model\.layers\.1\.mlp\..*proj",
        r"re:.*\.[12]\.self_attn\.[qv]_proj": r"model\.layers\.[12]\.self_attn\.[qv]_proj",
        r".*\.(q|v)_proj": r".*\.(q|v)_proj",
        "lm_head": "lm_head",
        "layers.0.*": r"model\.layers\.0\..*proj",
        "model.layers.*.q_proj": r"model\.layers\.\d\.self_attn\.q_proj",
    }.items():
        hit = find_modules(model, targets, None, (), usable=lambda m: isinstance(m, nn.Linear))
        every = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(wanted, p)}
        assert set(hit) == every, targets
    assert len(find_modules(model, r"re:q_proj|.*\.layers\.0\.mlp\.up_proj", None, ())) == 1, "a regex must match the full path"


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("last:1", {2}), ("first:2", {0, 1}), ("0", {0}), ("0,2", {0, 2}), ("1-2", {1, 2}), (" 0 , 1-2", {0, 1, 2}), ("last:9", {0, 1, 2}),
    ],
)
def test_layers(layers: str, wanted: set[int]) -> None:
    hit = find_modules(tiny.llama(), "q", layers, ())
    assert {int(p.split(".")[2]) for p in hit} == wanted


@pytest.mark.parametrize("layers", ["9", "2-9,9", "last:x", "", "a", "1-", "-1", "last:0"])
def test_layers_that_cannot_be(layers: str) -> None:
    with pytest.raises((SpecError, TargetError)) as error:
        st.attach(tiny.llama(), st.LoRA(targets="q", layers=layers))
    assert error.value.hint


def test_layers_hold_for_each_stack() -> None:
    hit = find_modules(tiny.t5(), "q", "last:1", ())
    assert {p.split(".layer.")[0] for p in hit} == {"encoder.block.1", "decoder.block.1"}


def test_exclude() -> None:
    hit = find_modules(tiny.llama(), "all-linear", None, ("mlp", "layers.0.*"))
    assert {p.split(".")[2] for p in hit} == {"1", "2"}
    assert {p.split(".")[3] for p in hit} == {"self_attn"}
    hit = find_modules(tiny.llama(), "all-linear", None, ("model.layers.1", "o"))
    assert not [p for p in hit if ".1." in p or p.endswith("o_proj")]
    with pytest.raises(TargetError, match="exclude pattern 'q_prj' matches no module"):
        find_modules(tiny.llama(), "all-linear", None, ("q_prj",))
    with pytest.raises(TargetError, match="no module is left"):
        find_modules(tiny.llama(), "q", None, ("attention",))


@pytest.mark.parametrize(
    ("targets", "what", "hint"),
    [
        ("q_prj", "'q_prj' matches no module", "q_proj"),
        (("q_proj", "down_prj"), "'down_prj' matches no module", "down_proj"),
        ("atention", "matches no module", "attention"),
        ("all_linear", "matches no module", "all-linear"),
        ("self_attn", "names only modules that cannot carry", "q_proj"),
        ("re:(", "not a valid regex", "re:"),
        ("qkv", "'qkv' matches no module", "q_proj"),
        ("*.nothing.*", "matches no module", "q_proj"),
    ],
)
def test_dead_patterns(targets: object, what: str, hint: str) -> None:
    model = tiny.llama()
    with pytest.raises(TargetError) as error:
        st.attach(model, st.LoRA(targets=targets))
    assert what in error.value.what
    assert hint in error.value.hint
    assert "slim_state" not in model.__dict__


@pytest.mark.parametrize(
    ("name", "spec", "what"),
    [
        ("vit", st.LoRA(targets="embedding"), "this ViTForImageClassification has no table of token embeddings"),
        ("vae", st.Bottleneck(), "this AutoencoderKL has no last layer of a feed-forward known by its name"),
        ("clip", st.Dense(), "this CLIPModel has no output head known by its name"),
        ("dit", st.LayerNormTuning(), "names only modules that cannot carry this op: a LayerNorm without a weight of its own"),
        ("mlp", st.IA3(), "this Sequential has no key projection known by its name"),
        ("TinyText", st.VeRA(), "does not fit 4 of 8 sites: VeRA's shared matrices fit linear layers only"),
    ],
)
def test_a_method_without_a_place_says_why(name: str, spec: st.Spec, what: str) -> None:
    model = getattr(tiny, name)()
    with pytest.raises((SpecError, TargetError)) as error:
        st.attach(model, spec)
    assert what in error.value.what
    assert error.value.hint
    assert "slim_state" not in model.__dict__


def test_heads_of_models_that_do_not_tell() -> None:
    assert heads(tiny.unet()) == {"conv_out"}
    assert heads(tiny.flux()) == {"proj_out"}
    assert heads(tiny.vae()) == {"decoder.conv_out"}
    assert heads(tiny.TinyText()) == {"classifier"}
    assert heads(nn.Sequential(nn.Linear(2, 2))) == set()
    assert heads(tiny.llama("LlamaModel")) == set(), "a body has no head"


def test_the_model_itself_can_be_a_site() -> None:
    model = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    base = model(x)
    st.attach(model, st.LoRA(r=2))
    nn.init.ones_(next(iter(model.slim_state.adapters["default"].ops.values())).B)
    assert not torch.equal(model(x), base)
    with st.disabled(model):
        assert torch.equal(model(x), base)
    st.detach(model, "default")
    assert type(model) is nn.Linear


@pytest.mark.parametrize("name", ["bart", "whisper", "gpt2", "t5"])
def test_embeddings_are_what_they_say_or_refused(name: str) -> None:
    """Subclasses of nn.Embedding that look up something else than their input must not be taken for plain ones."""
    model = getattr(tiny, name)()
    sample = {
        "whisper": {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[3, 4, 5], [3, 6, 7]])},
        "gpt2": {"input_ids": torch.tensor([[3, 4, 5], [3, 6, 7]])},
    }.get(name, {"input_ids": torch.tensor([[3, 4, 5], [3, 6, 7]]), "decoder_input_ids": torch.tensor([[2, 4, 5], [2, 6, 7]])})
    st.attach(model, st.LoRA(r=2, targets="embedding"))
    for p in model.slim_state.adapters["default"].parameters():
        nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        out = model(**sample).logits
        st.merge(model)
        assert torch.allclose(model(**sample).logits, out, atol=1e-4)


def test_a_dead_rank_pattern_is_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for spec in (st.LoRA(rank_pattern={"q_proj": 2}), st.LoRA(alpha_pattern={"0": 3.0, "nope": 2.0})):
        with pytest.raises(st.SlimtuneError, match="fits none of the 2 modules"):
            st.attach(model, spec)
    st.attach(model, st.LoRA(r=4, rank_pattern={"1": 2}))
    assert [op.r for op in model.slim_state.adapters["default"].ops.values()] == [4, 2]
