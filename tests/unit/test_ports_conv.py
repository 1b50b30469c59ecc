"""Convolutions: every geometry, and parity with the reference library."""

from __future__ import annotations

import warnings

import pytest
import torch
from ports_props import check_all, check_bf16, check_gradients, check_rows, put_factors, randomise
from torch import nn

import slimtune as st

CASES = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2), (4, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (4, 2, 3, 4, 5)),
    "1x1": (nn.Conv2d(4, 6, 1), (4, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2), (4, 4, 7, 7)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4, bias=False), (4, 4, 9)),
    "same": (nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2), (4, 4, 7, 7)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 4, 6, 6)),
    "reflect": (nn.Conv1d(4, 6, 5, padding="same", padding_mode="reflect"), (4, 4, 9)),
}


def build(case: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    conv, shape = CASES[case]
    model = nn.Sequential(type(conv)(**options(conv)))
    return model, torch.randn(shape)


def options(conv: nn.Module) -> dict:
    keys = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {k: getattr(conv, k) for k in keys} | {"bias": conv.bias is not None}


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spec", [st.LoRA(r=4, targets="conv"), st.Dense(targets="conv"), st.BitFit(targets="conv", missing="add")], ids=str)
def test_properties(case: str, spec: st.Spec) -> None:
    model, x = build(case)
    check_all(model, call, x, spec)


@pytest.mark.parametrize("case", CASES)
def test_rows(case: str) -> None:
    model, x = build(case)
    check_rows(model, call, x, lambda b, s: b[s], st.LoRA(r=4, targets="conv", up_bias=True))


@pytest.mark.parametrize("case", ["conv1d", "grouped", "depthwise", "circular"])
def test_gradients(case: str) -> None:
    model, x = build(case)
    check_gradients(model, call, x[:1], st.LoRA(r=4, targets="conv"))


@pytest.mark.parametrize("case", ["conv2d", "grouped"])
def test_bf16(case: str) -> None:
    model, x = build(case)
    check_bf16(model, call, x.bfloat16(), st.LoRA(r=4, targets="conv"))


@pytest.mark.parametrize("case", CASES)
def test_unbatched_input(case: str) -> None:
    model, x = build(case)
    st.attach(model, st.LoRA(r=4, targets="conv", up_bias=True))
    randomise(model, "default")
    torch.testing.assert_close(model(x[0]), model(x[:1])[0], atol=1e-6, rtol=1e-5)
    with st.use(model, rows=["default"]):
        torch.testing.assert_close(model(x[0]), model(x[:1])[0], atol=1e-6, rtol=1e-5)
    with st.use(model, rows=[None, "default"]), pytest.raises(st.SlimtuneError, match="2 rows"):
        model(x[0])


def test_rank_and_groups() -> None:
    model, _ = build("depthwise")
    with pytest.raises(st.SlimtuneError, match="multiple of the 4 groups"):
        st.attach(model, st.LoRA(r=6, targets="conv"))


def test_transposed_and_own_forward_are_refused() -> None:
    with pytest.raises(st.SlimtuneError, match="cannot carry"):
        st.attach(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), st.LoRA(targets=("0",)))

    class Odd(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    with pytest.raises(st.SlimtuneError, match="forward of its own"):
        st.attach(nn.Sequential(Odd(2, 2, 3)), st.LoRA(r=2, targets="conv"))


def test_weight_norm_runs_and_refuses_to_merge() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    x = torch.randn(2, 4, 8)
    base = model(x)
    st.attach(model, st.LoRA(r=2, targets="conv"))
    torch.testing.assert_close(model(x), base)
    with pytest.raises(st.SlimtuneError, match="parametrization"):
        st.merge(model, "default")
    torch.testing.assert_close(model(x), base)


# ---- the reference library -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["conv1d", "conv2d", "conv3d", "1x1", "grouped_plain", "depthwise_plain"])
def test_reference_parity(case: str) -> None:
    import peft
    torch.manual_seed(0)
    plain = {"grouped_plain": (nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1), (2, 4, 7, 7)), "depthwise_plain": CASES["depthwise"]}
    conv, shape = (plain | CASES)[case]
    ours = nn.Sequential(type(conv)(**options(conv)))
    theirs = nn.Sequential(type(conv)(**options(conv)))
    theirs.load_state_dict(ours.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False))
    layer = theirs.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    st.attach(ours, st.LoRA(r=4, alpha=8, targets="conv"))
    op = next(iter(ours.slim_state.adapters["default"].ops.values()))
    kind = op.kind
    assert B.shape == op.B.shape
    assert A.shape in kind.layouts(ours[0], "weight", 4)
    x = torch.randn(shape)
    put_factors(op, A, B)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    if ours[0].groups > 1:  # the reference's A sees all inputs: no grouped weight equals it
        with pytest.raises(st.SlimtuneError, match="sees all"):
            st.merge(ours, "default")
    else:
        merged = theirs.merge_and_unload()
        st.merge(ours, "default")
        torch.testing.assert_close(ours[0].weight, merged[0].weight, atol=1e-6, rtol=1e-5)


def test_our_grouped_factors_run_in_the_reference_layout() -> None:
    model, x = build("grouped")
    st.attach(model, st.LoRA(r=4, targets="conv"))
    randomise(model, "default")
    op = next(iter(model.slim_state.adapters["default"].ops.values()))
    y, A, B = model(x), op.A.detach().clone(), op.B.detach().clone()
    wide = op.kind.widen(A, 2)
    assert wide.shape == (4, 4, 3, 3)
    put_factors(op, wide, B)
    assert torch.equal(op.A, A)  # recognised as ours
    wide = wide + 0.1
    put_factors(op, wide, B)
    assert op.A.shape == wide.shape
    assert not torch.allclose(model(x), y)
