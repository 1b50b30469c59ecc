"""nn.Linear and transformers' Conv1D: properties and parity with the reference library."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from ports_props import check_all, check_bf16, check_gradients, check_rows, put_factors
from torch import nn

import slimtune as st

SPECS = [st.LoRA(r=3), st.LoRA(r=3, up_bias=True), st.Dense(targets="all-linear"), st.BitFit(missing="add")]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        return nn.Sequential(Conv1D(10, 6))
    return nn.Sequential(nn.Linear(6, 10, bias=kind != "bare"))


def call(model: nn.Module, x: Any) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("kind", ["linear", "bare", "conv1d"])
@pytest.mark.parametrize("spec", SPECS, ids=["lora", "up_bias", "dense", "bitfit"])
def test_properties(kind: str, spec: st.Spec) -> None:
    x = torch.randn(4, 3, 6)
    check_all(build(kind), call, x, spec)
    check_rows(build(kind), call, x, lambda b, s: b[s], spec)
    check_gradients(build(kind), call, x, spec)
    check_bf16(build(kind), call, x.bfloat16(), spec)


@pytest.mark.parametrize("kind", ["linear", "bare", "conv1d"])
def test_reference_parity(kind: str) -> None:
    import peft
    ours = build(kind)
    theirs = copy.deepcopy(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=kind == "conv1d")
        theirs = peft.get_peft_model(theirs, config)
    layer = theirs.base_model.model[0]
    st.attach(ours, st.LoRA(r=3, alpha=6))
    (op,) = ours.slim_state.adapters["default"].ops.values()
    put_factors(op, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
