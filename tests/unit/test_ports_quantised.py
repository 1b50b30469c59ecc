"""bitsandbytes layers on the CPU: run, train, merge, unmerge to the bit, copy."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import bitsandbytes as bnb
import pytest
import torch
from ports_props import randomise
from torch import nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.report import true_numel
from slimtune.core.targets import kind_of

KINDS = ["nf4", "fp4", "nf4_double", "int8"]


def build(kind: str, bias: bool = True) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=bias)
    if kind == "int8":
        layer: nn.Module = bnb.nn.Linear8bitLt(128, 64, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            128, 64, bias=bias, compute_dtype=torch.float32, compress_statistics=kind.endswith("double"), quant_type=kind[:3]
        )
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data.clone(), requires_grad=False, compress_statistics=kind.endswith("double"), quant_type=kind[:3], module=layer
        )
    if bias:
        layer.bias = nn.Parameter(plain.bias.data.clone(), requires_grad=False)
    return nn.Sequential(layer.to("cpu"), nn.ReLU(), nn.Linear(64, 8)).eval().requires_grad_(False), plain


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in base_state_dict(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_read_is_what_the_layer_multiplies_with(kind: str) -> None:
    model, plain = build(kind)
    found = kind_of(model[0])
    assert found is not None
    assert found.quantised
    assert found.name == "linear"
    eye = torch.eye(128)
    model.train()
    W = found.read(model[0], "weight")
    assert W.dtype == torch.float32
    assert W.shape == (64, 128)
    assert 0 < (W - plain.weight).abs().max() < 0.02
    torch.testing.assert_close((model[0](eye) - model[0].bias).T, W, atol=2e-3, rtol=2e-2)
    model.eval()(eye)  # it may have repacked itself
    torch.testing.assert_close(found.read(model[0], "weight"), W, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_lifecycle(kind: str, bias: bool) -> None:
    model, _ = build(kind, bias)
    x = torch.randn(6, 128)
    before = bits(model)
    st.attach(model, st.LoRA(r=4, targets=("0",)))
    with st.disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)
    optimiser = torch.optim.Adam(model.slim_state.adapters["default"].parameters(), lr=0.01)
    model.train()
    losses = []
    for _ in range(5):
        inputs = x.clone().requires_grad_()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        assert inputs.grad is not None
        assert inputs.grad.abs().sum() > 0
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    randomise(model, "default", 0.05)
    live = model(x).detach()
    with st.disabled(model):
        assert torch.equal(model(x), base)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), live)
    effective = kind_of(model[0]).read(model[0], "weight") + next(iter(model.slim_state.adapters["default"].ops.values())).delta()
    st.merge(model, "default")
    error = (kind_of(model[0]).read(model[0], "weight") - effective).abs().max()
    assert error < 0.15 * effective.abs().max()  # one quantisation step, not more
    merged = model(x)
    assert (merged - live).abs().mean() < 0.2 * (live - base).abs().mean() + 0.02
    with st.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), merged)
    st.unmerge(model)
    assert torch.equal(model(x), live)
    after = bits(model)
    assert list(after) == list(before)
    assert all(torch.equal(before[k], after[k]) for k in before)
    with st.use(model, rows=["default", None] * 3):
        mixed = model(x)
    torch.testing.assert_close(mixed[1::2], base[1::2], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(mixed[::2], live[::2], atol=2e-2, rtol=2e-2)
    st.detach(model, "default")
    assert "slim_packing" not in model[0].__dict__
    torch.testing.assert_close(model(x), base, atol=2e-2, rtol=2e-2)  # some CPUs repack it now


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_before_or_between_does_not_stop_gradients(kind: str) -> None:
    """Some CPUs repack a 4-bit weight when it runs in eval mode, after which its input gets no gradient."""
    model, _ = build(kind)
    stack = nn.Sequential(nn.Linear(128, 128), model[0]).eval().requires_grad_(False)
    x = torch.randn(6, 128)
    with torch.no_grad():
        first = stack(x)
    st.attach(stack, st.LoRA(r=4, targets=("0",)))
    W = kind_of(stack[1]).read(stack[1], "weight")
    for mode in (True, False, True):
        stack.train(mode)
        inputs = x.clone().requires_grad_()
        y = stack(inputs)
        torch.testing.assert_close(y, first, atol=2e-2, rtol=2e-2)
        y.sum().backward()
        torch.testing.assert_close(inputs.grad, (W.sum(0) @ stack[0].weight).expand(6, -1), atol=2e-2, rtol=2e-2)
        with torch.no_grad():
            stack.eval()(x)
    assert all(p.grad is not None for p in stack.slim_state.adapters["default"].parameters())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bf16_activations(kind: str) -> None:
    model, _ = build(kind)
    layer = nn.Sequential(model[0])
    st.attach(layer, st.LoRA(r=4, targets=("0",)))
    randomise(layer, "default", 0.05)
    y = layer(torch.randn(3, 128).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.slim_state.adapters["default"].parameters())


def test_bias_alone_merges() -> None:
    for kind in KINDS:
        model, _ = build(kind)
        x = torch.randn(3, 128)
        st.attach(model, st.BitFit(targets=("0",)))
        with st.disabled(model):
            base = model(x)
        randomise(model, "default")
        live = model(x)
        st.merge(model, "default")
        torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-5)
        st.unmerge(model)
        with st.disabled(model):
            assert torch.equal(model(x), base)


def test_report_counts_weights_not_bytes() -> None:
    for kind in KINDS:
        model, plain = build(kind)
        assert true_numel(model[0].weight, model[0]) == plain.weight.numel()
        report = st.attach(model, st.LoRA(r=4, targets=("0",)))
        assert report.total == sum(p.numel() for p in plain.parameters()) + 64 * 8 + 8 + 4 * (128 + 64)


def test_bitsandbytes_is_not_imported_for_others() -> None:
    code = "import torch, sys, slimtune as st; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); st.attach(m, st.LoRA(r=2)); st.merge(m, 'default')"
    code += "; assert not [n for n in sys.modules if n.split('.')[0] in {'bitsandbytes', 'transformers'}]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_quantised_weights_are_not_read() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = nn.Sequential(Packed())
    st.attach(model, st.LoRA(r=2))
    randomise(model, "default")
    model(torch.randn(2, 4))
    with pytest.raises(st.SlimtuneError, match=r"keeps its weight as torch\.int8"):
        st.merge(model, "default")


def test_a_merge_that_loses_much_of_the_change_says_so() -> None:
    """A change smaller than a step of four bits, or of bfloat16, is mostly rounded away; float32 keeps it, and nothing is said."""
    plain = nn.Sequential(nn.Linear(64, 64))
    for model, silent in ((build("nf4")[0], False), (copy.deepcopy(plain).to(torch.bfloat16), False), (plain, True)):
        st.attach(model, st.LoRA(r=2, targets=("0",)))
        randomise(model, "default", 1e-3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            st.merge(model, "default")
        found = [str(w.message) for w in said if "rounds by" in str(w.message)]
        assert (not found) == silent
        if found:
            assert "most at 0:" in found[0]
        st.unmerge(model)
