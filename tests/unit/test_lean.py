"""st.lean: the same losses and gradients, fewer bytes, and nothing left behind by unlean."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import slimtune as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from slimtune.testing.live_bytes import LiveBytes

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}


def llama(dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more)).to(dtype).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "labels": labels}


def run(model: nn.Module, **more: object) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch(), **more).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def shaken(model: nn.Module, spec: st.Spec) -> nn.Module:
    """Attach and give every parameter of the adapter a value, so that every gradient is exercised."""
    st.attach(model, spec)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_same_loss_and_gradients(dtype: torch.dtype, checkpointing: bool | None) -> None:
    plain = shaken(llama(dtype), st.LoRA(r=4))
    lean = copy.deepcopy(plain)
    report = st.lean(lean)
    norms = {} if dtype == torch.float64 else {"RMSNorm": 5}  # transformers rounds a float64 norm to float32: not ours, left alone
    found = {form: n for form, n in report.changed.items() if form != "heap"}  # a matter of the machine
    assert found == {"gated MLP": 2, "activation": 2, "loss head": 1, "attention": 1, **norms}
    if checkpointing is not None:
        lean.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    (a, ga), (b, gb) = run(plain), run(lean)
    tolerance = 2e-6  # transformers computes norms and losses in float32, also for a float64 model
    assert abs(a - b) < tolerance
    assert len(ga) == len(gb) > 0
    for p, q in zip(ga, gb, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance * 10, atol=tolerance)


def test_accumulation_and_items_in_batch() -> None:
    plain = shaken(llama(), st.LoRA(r=4))
    lean = copy.deepcopy(plain)
    st.lean(lean)
    for items in (7, torch.tensor(21)):
        (a, ga), (b, gb) = run(plain, num_items_in_batch=items), run(lean, num_items_in_batch=items)
        assert a == pytest.approx(b, abs=1e-6)
        torch.testing.assert_close(ga, gb, rtol=1e-5, atol=1e-6)


def test_bfloat16_gives_the_same_loss() -> None:
    plain = shaken(llama(torch.bfloat16), st.LoRA(r=4))
    lean = copy.deepcopy(plain)
    st.lean(lean)
    (a, ga), (b, gb) = run(plain), run(lean)
    assert a == pytest.approx(b, rel=1e-3)  # rounding only: sums over chunks and probabilities are taken in another order
    for p, q in zip(ga, gb, strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=5e-3)


def test_keeps_far_fewer_bytes() -> None:
    model = shaken(llama(torch.bfloat16), st.LoRA(r=4))

    def kept() -> int:
        run(model)
        with LiveBytes() as live:
            loss = model(**batch()).loss
            now = live.now
        del loss
        return now

    before = kept()
    st.lean(model)
    after = kept()
    assert after < 0.5 * before, (before, after)


def test_logits_come_when_asked_for() -> None:
    model = shaken(llama(), st.LoRA(r=4))
    want = model(**batch()).logits
    st.lean(model)
    out = model(**batch())
    assert out.logits.shape == want.shape
    torch.testing.assert_close(out.logits + 0, want)
    assert torch.equal(out.logits.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(out.logits[..., :-1, :].contiguous().float(), want[..., :-1, :])


def test_unlean_leaves_nothing_behind() -> None:
    model = llama()
    classes = {n: type(m) for n, m in model.named_modules()}
    facts = {n: set(m.__dict__) for n, m in model.named_modules()}
    st.lean(model)
    assert isinstance(model, LlamaForCausalLM)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert any(type(m) is not classes[n] for n, m in model.named_modules())
    copy.deepcopy(model)
    st.unlean(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == facts


def gemma2(**more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=5.0, **more)).train()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).train()


def bart() -> nn.Module:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}
    model = BartForConditionalGeneration(BartConfig(vocab_size=200, d_model=32, dropout=0.0, max_position_embeddings=64, **sides)).train()
    model.final_logits_bias.normal_()
    return model


HEADS = {
    "causal": (llama, st.LoRA(r=4)),
    "soft-capped": (gemma2, st.LoRA(r=4)),
    "tied": (lambda: gemma2(tie_word_embeddings=True), st.LoRA(r=4)),
    "T5": (t5, st.LoRA(r=4, targets=("q", "v"))),
    "BART, a bias over the vocabulary": (bart, st.LoRA(r=4, targets=("q_proj", "v_proj"))),
    "adapted": (llama, st.LoRA(r=4, targets=("q_proj", "lm_head"))),
    "adapted and soft-capped": (gemma2, st.LoRA(r=4, targets=("q_proj", "lm_head"))),
    "adapted by a DoRA": (llama, st.DoRA(of=st.LoRA(r=4, targets=("q_proj", "lm_head")))),
    "trained": (llama, st.LoRA(r=4, train_modules="lm_head")),
    "adapted alone": (llama, st.LoRA(r=4, targets="lm_head")),
}


@pytest.mark.parametrize("name", HEADS)
def test_no_head_makes_logits_for_its_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and the same gradients, for the same parameters, and at no time a row of logits for each token."""
    make, spec = HEADS[name]
    plain = shaken(make(), spec)
    lean = copy.deepcopy(plain)
    st.lean(lean)
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = linear(x, weight, bias)
        seen.append(y.numel() // 200 if y.shape[-1] == 200 else 0)
        return y

    a, ga = run(plain)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    b, gb = run(lean)
    assert a == pytest.approx(b, abs=1e-5)
    assert [p.shape for p in ga] == [p.shape for p in gb]
    for p, q in zip(ga, gb, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    labelled = int((batch()["labels"] != -100).sum())
    assert max(seen) <= labelled < batch()["labels"].numel()


def test_logits_of_an_adapted_head_are_those_of_their_own_plan() -> None:
    model = shaken(llama(), st.LoRA(r=4, targets=("q_proj", "lm_head")))
    with st.disabled(model):
        bare = model(**batch()).logits
    adapted = model(**batch()).logits
    rows = ["default", None, "default"]
    st.lean(model)
    with st.disabled(model):
        out = model(**batch())
    torch.testing.assert_close(out.logits + 0, bare)  # read after the block is left
    torch.testing.assert_close(model(**batch()).logits + 0, adapted)
    with st.use(model, rows=rows):
        mixed = model(**batch()).logits
    torch.testing.assert_close(mixed[1] + 0, bare[1])
    torch.testing.assert_close(mixed[0] + 0, adapted[0])


def test_an_adapter_that_rests_on_the_head_gets_no_gradient() -> None:
    model = shaken(llama(), st.LoRA(r=4, targets="lm_head"))
    st.attach(model, st.LoRA(r=4, targets="lm_head"), name="other")
    st.use(model, "default")
    for p in model.parameters():
        p.requires_grad_(p.requires_grad or p.shape[0] == 4 or p.shape[-1] == 4)
    st.lean(model)
    model(**batch()).loss.backward()
    ops = {name: adapter.ops["lm_head", "weight"] for name, adapter in model.slim_state.adapters.items()}
    assert all(p.grad is not None for p in ops["default"].parameters())
    assert all(p.grad is None for p in ops["other"].parameters())


def test_encoder_classifier() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = shaken(BertForSequenceClassification(config).train(), st.LoRA(r=4, train_modules="classifier"))
    lean = copy.deepcopy(plain)
    report = st.lean(lean)
    assert report.changed["LayerNorm"] == 5
    assert report.left, "a classifier has no language-model head, and the report says so"
    inputs = {"input_ids": batch()["input_ids"], "labels": torch.tensor([0, 1, 1])}
    grads = []
    for model in (plain, lean):
        loss = model(**inputs).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_kernels_against_autograd_in_float64() -> None:
    from slimtune.kernels.gated import gated
    from slimtune.kernels.loss import head_loss
    from slimtune.kernels.rmsnorm import STYLES, rms_norm

    torch.manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    weight, bias, target = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, dtype=torch.float64), torch.randint(0, 11, (5,))
    for smoothing, cap in ((0.0, 0.0), (0.1, 0.0), (0.0, 3.0), (0.2, 3.0)):

        def chunked(h: torch.Tensor, smoothing: float = smoothing, cap: float = cap) -> torch.Tensor:
            return head_loss(h, weight, bias, target, smoothing=smoothing, softcap=cap, chunk=2, wide_type=torch.float64)

        def plain(h: torch.Tensor, smoothing: float = smoothing, cap: float = cap) -> torch.Tensor:
            logits = torch.nn.functional.linear(h, weight, bias)
            logits = cap * torch.tanh(logits / cap) if cap else logits
            return torch.nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)

        h = leaf(5, 6)
        torch.testing.assert_close(chunked(h), plain(h))
        assert torch.autograd.gradcheck(chunked, (h,))
    for f in (torch.nn.functional.silu, torch.nn.functional.gelu):
        assert torch.autograd.gradcheck(lambda g, u, f=f: gated(g, u, f), (leaf(3, 4), leaf(3, 4)))
    gain = torch.rand(6, dtype=torch.float64)
    for style in STYLES:
        assert torch.autograd.gradcheck(lambda x, style=style: rms_norm(x, gain, 1e-6, style), (leaf(3, 6),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_as_wide_as_real_ones_are_recognised(dtype: torch.dtype) -> None:
    """Bit for bit, in each type: a sum in another order is only seen over many elements."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from slimtune.savers.norms import recognise_rms

    for width in (576, 2048, 4096):
        for norm in (LlamaRMSNorm(width), Gemma3RMSNorm(width)):
            torch.nn.init.normal_(norm.weight)
            assert recognise_rms(norm.to(dtype)) is not None, (type(norm).__name__, width)


def test_a_hopeless_label_costs_what_it_costs_in_plain_torch() -> None:
    from slimtune.kernels.loss import head_loss

    weight = torch.tensor([[300.0], [0.0], [-300.0]])  # the softmax of the last class is 0 in float32, its logarithm is not
    hidden, target = torch.ones(2, 1), torch.tensor([2, 1])
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    assert plain == 900
    torch.testing.assert_close(head_loss(hidden, weight, None, target), plain)


def test_an_activation_is_made_once_in_backward_for_both_that_ask() -> None:
    from slimtune.kernels.gated import gated
    from slimtune.kernels.lowrank import linear_low_rank

    calls = []

    def f(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return torch.nn.functional.silu(x)

    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    A, B, W = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, requires_grad=True), torch.randn(5, 4)
    linear_low_rank(gated(gate, up, f), W, None, A, B, 1.0).sum().backward()
    assert len(calls) == 2  # forward; then for A's gradient and for gate's together
    got = [p.grad for p in (gate, up, A, B)]
    x = torch.nn.functional.silu(gate) * up
    want = torch.autograd.grad((x @ W.T + x @ A.T @ B.T).sum(), (gate, up, A, B))
    torch.testing.assert_close(got, list(want))


@pytest.mark.parametrize("kind", ["all", "causal", "bool", "float", "per head"])
def test_attention_kernel_equals_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.kernels import attention as kernel

    monkeypatch.setattr(kernel, "BLOCK", 3)  # several blocks, the last one short
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    mask = None
    if kind in {"bool", "float", "per head"}:
        mask = (torch.rand(2, 4 if kind == "per head" else 1, 7, 7) > 0.3) | torch.eye(7, dtype=torch.bool)
        mask = torch.where(mask, 0.0, -1e30).double() if kind == "float" else mask

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        causal = kind == "causal"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True).transpose(1, 2)

    def lean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernel.attention(q, k, v, mask, kind == "causal", 0.3)

    torch.testing.assert_close(lean(q, k, v), plain(q, k, v))
    assert torch.autograd.gradcheck(lean, (q, k, v), fast_mode=True)


def test_lean_attention_on_padded_rows() -> None:
    """Left and right padding, in bfloat16, where the kernel is used: the same loss and gradients as torch's attention to rounding."""
    for side in (slice(0, 5), slice(11, 16)):
        plain = shaken(llama(torch.bfloat16, num_key_value_heads=2), st.LoRA(r=4))
        lean = copy.deepcopy(plain)
        assert st.lean(lean).changed["attention"] == 1
        mask = torch.ones(3, 16, dtype=torch.long)
        mask[1, side] = 0
        (a, ga), (b, gb) = run(plain, attention_mask=mask), run(lean, attention_mask=mask)
        assert a == pytest.approx(b, rel=1e-3)
        for p, q in zip(ga, gb, strict=True):
            torch.testing.assert_close(p, q, rtol=0.05, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_an_operator(causal: bool) -> None:
    from slimtune.kernels.attention import _opaque, attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4).requires_grad_() for heads in (4, 2, 2))
    mask = None if causal else torch.rand(2, 1, 7, 7) > 0.3
    torch.library.opcheck(_opaque, (q, k, v, mask, causal, 0.3))
    got, want = _opaque(q, k, v, mask, causal, 0.3), attention(q, k, v, mask, causal, 0.3)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g))


def test_a_compiled_lean_model_keeps_the_lean_attention() -> None:
    """One graph, the operator in it, and the loss and gradients of the same model uncompiled."""
    torch._dynamo.reset()
    model = shaken(llama(torch.bfloat16), st.LoRA(r=4))
    st.lean(model)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(graph.code)
        return graph.forward

    fast = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad(set_to_none=True)
    loss = fast(**batch()).loss
    loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert [code.count("slimtune.attention") for code in seen] == [2]
    want, grads = run(model)
    assert float(loss.detach()) == pytest.approx(want, rel=1e-3)
    for p, q in zip(got, grads, strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=1e-2)
