"""Norms: biases and gains, BitFit's default targets, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ports_props import check_all, check_bf16, check_gradients, check_rows
from torch import nn

import slimtune as st
from slimtune.core.targets import kind_of


class TinyRMSNorm(nn.Module):
    """As in most decoders."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class ShiftedRMSNorm(TinyRMSNorm):
    """As in Gemma: the gain is 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.weight * (1 + self.weight)


NORMS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(6),
    "layer_no_bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "tiny": lambda: TinyRMSNorm(6),
    "shifted": lambda: ShiftedRMSNorm(6),
    "group": lambda: nn.GroupNorm(2, 6),
}


def build(case: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(NORMS[case]()), torch.randn(4, 6, 3) if case == "group" else torch.randn(4, 3, 6)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("case", NORMS)
def test_gains(case: str) -> None:
    model, x = build(case)
    check_all(model, call, x, st.Dense(targets="norm"))
    check_rows(model, call, x, lambda b, s: b[s], st.Dense(targets="norm"))
    check_gradients(model, call, x, st.Dense(targets="norm"))


@pytest.mark.parametrize("case", ["layer", "tiny"])
def test_bf16(case: str) -> None:
    model, x = build(case)
    check_bf16(model, call, x.bfloat16(), st.Dense(targets="norm"))


@pytest.mark.parametrize("case", ["layer", "layer_no_bias", "group"])
def test_biases(case: str) -> None:
    model, x = build(case)
    check_all(model, call, x, st.BitFit(missing="add"))
    check_rows(model, call, x, lambda b, s: b[s], st.BitFit(missing="add"))


@pytest.mark.parametrize("case", NORMS)
def test_low_rank_is_refused(case: str) -> None:
    with pytest.raises(st.SlimtuneError, match="no matrix"):
        st.attach(build(case)[0], st.LoRA(targets="norm"))


def test_rms_norms_take_no_bias() -> None:
    with pytest.raises(st.SlimtuneError):
        st.attach(build("tiny")[0], st.BitFit(targets="norm", missing="add"))


def test_lookalikes_are_no_norms() -> None:
    class GatedRMSNorm(TinyRMSNorm):
        def __init__(self) -> None:
            super().__init__(4)
            self.gate = nn.Linear(4, 4)

    kind = kind_of(GatedRMSNorm())
    assert kind is not None
    assert kind.name == "module"


def test_transformers_norms() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for cls in (GemmaRMSNorm, LlamaRMSNorm):
        check_all(nn.Sequential(cls(6)), call, torch.randn(4, 3, 6), st.Dense(targets="norm"))
    assert kind_of(T5LayerNorm(4)).name == "norm"  # an RMS norm in spite of its name


def test_bitfit_defaults() -> None:
    both = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    assert sorted(r.path for r in st.attach(both, st.BitFit()).rows) == ["0", "1"]
    plain = nn.Sequential(nn.Linear(4, 4))
    assert [r.path for r in st.attach(plain, st.BitFit()).rows] == ["0"]
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), TinyRMSNorm(4))
    assert [r.path for r in st.attach(bare, st.BitFit()).rows] == ["0"]  # none has a bias: the linear gets one
    with pytest.raises(st.SlimtuneError, match="matches no module"):
        st.attach(nn.Sequential(nn.ReLU()), st.BitFit())
    with pytest.raises(st.SlimtuneError, match="matches no module"):
        st.attach(nn.Sequential(nn.Linear(4, 4)), st.BitFit(targets=("norm",)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False)], ids=["LayerNorm", "RMSNorm"])
def test_a_norm_without_a_gain_can_carry_output_ops(norm: nn.Module) -> None:
    """As in diffusion transformers, whose gains are computed from the time."""
    model = nn.Sequential(nn.Linear(8, 8), norm)
    st.attach(model, st.Bottleneck(targets="1", reduction=2))
    with torch.no_grad():
        for p in model.slim_state.adapters["default"].parameters():  # type: ignore[union-attr]
            nn.init.normal_(p)
    x = torch.randn(3, 8)
    with st.disabled(model):
        base = model(x)
    assert not torch.allclose(model(x), base)
    with pytest.raises(st.SlimtuneError, match="without a weight of its own"):
        st.attach(model, st.LayerNormTuning(targets="1"), name="b")
