"""Initialisers: the output is the base's, the factors are the formula's and the reference library's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ports_props import randomise
from safetensors.torch import save_file
from torch import nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.targets import kind_of
from slimtune.initialise import INITS, STUDIES

SPECTRAL = ["pissa", "pissa_fast", "minor", "olora"]


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 6)


def experts() -> nn.Module:
    from test_ports_experts import nemotron

    return nemotron()[0]


SITES: dict[str, tuple[Any, Any, str]] = {
    "linear": (lambda: nn.Linear(6, 10), lambda: torch.randn(3, 6), "all-linear"),
    "conv1d": (conv1d, lambda: torch.randn(3, 6), "all-linear"),
    "conv": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5), "conv"),
    "grouped": (lambda: nn.Conv1d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 8), "conv"),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: torch.arange(12), "embedding"),
    "experts": (experts, None, "experts"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), None, "attention"),
}


# Rounding of float64 where the parts of a sum are up to 1e3 times the result: 1e-16 * 1e3, and 1e2 more for sums of up to 100 terms.
CLOSE = 1e-11


def build(site: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, data, _ = SITES[site]
    model = nn.Sequential(make()).requires_grad_(False).to(dtype)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    if site == "experts":
        from test_ports_experts import routed

        batch = [cast(t) for t in routed()]
        return model, lambda m: m[0](*batch)
    if site == "attention":
        x = cast(torch.randn(5, 3, 8))
        return model, lambda m: m[0](x, x, x)[0]
    x = cast(data())
    return model, lambda m: m(x)


def ops(model: nn.Module) -> list[Any]:
    return list(model.slim_state.adapters["default"].ops.values())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("init", sorted(set(INITS) - {"loftq"} - set(STUDIES)))
@pytest.mark.parametrize("stabilised", [False, True])
def test_start_is_the_base_and_the_base_is_untouched(site: str, init: str, stabilised: bool) -> None:
    # In float32 a start that is subtracted leaves rounding of the order of its size, in whatever order of sums.
    model, run = build(site, torch.float64)
    base = run(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.LoRA(r=4, init=init, targets=SITES[site][2], rank_stabilised=stabilised))
    torch.testing.assert_close(run(model), base, atol=CLOSE, rtol=CLOSE)
    assert all(torch.equal(v, before[k]) for k, v in base_state_dict(model).items())
    randomise(model, "default")
    live = run(model)
    assert (live - base).abs().max() > 1e-3
    st.merge(model, "default")
    torch.testing.assert_close(run(model), live, atol=CLOSE, rtol=CLOSE)
    st.unmerge(model)
    assert torch.equal(run(model), live)
    live.square().sum().backward()
    for op in ops(model):
        assert all(p.grad is not None for p in (op.A, op.B))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("init", SPECTRAL)
def test_formulas(site: str, init: str) -> None:
    model, _ = build(site)
    st.attach(model, st.LoRA(r=4, alpha=6, init=init, targets=SITES[site][2]))
    for op in ops(model):
        W = op.kind.read(model[0], op.param)
        part = op.scale * op.kind.compose(op.A, op.B, op.shape)
        assert torch.equal(op.A, op.A0)
        q = op.kind.inner_rank(model[0], 4)
        for M, P in zip(op.kind.matrices(W, model[0]), op.kind.matrices(part, model[0]), strict=True):
            U, S, V = torch.linalg.svd(M, full_matrices=False)
            if init == "olora":
                Q, R = torch.linalg.qr(M)
                expected = op.scale * Q[:, :q] @ R[:q]
            elif init == "minor":
                expected = U[:, -q:] * S[-q:] @ V[-q:]
            else:
                expected = U[:, :q] * S[:q] @ V[:q]
            torch.testing.assert_close(P, expected, atol=1e-4 if init == "pissa_fast" else 1e-5, rtol=1e-3)


@pytest.mark.parametrize("init", ["orthogonal"])
@pytest.mark.parametrize("r", [1, 4, 5])
def test_orthogonal(init: str, r: int) -> None:
    model, _ = build("linear")
    st.attach(model, st.LoRA(r=r, init=init))
    (op,) = ops(model)
    assert (op.B @ op.A).abs().max() < 1e-6
    if r > 1:
        assert op.A.abs().max() > 0.01
        assert op.B.abs().max() > 0.01


@pytest.mark.parametrize("site", SITES)
def test_factorise_inverts_compose(site: str) -> None:
    model, _ = build(site)
    kind = kind_of(model[0])
    for param in kind.names(model[0]):
        shape_a, shape_b = kind.factor_shapes(model[0], param, 4)
        A, B = torch.randn(shape_a), torch.randn(shape_b)
        shape = kind.shape(model[0], param)
        delta = kind.compose(A, B, shape)
        A2, B2 = kind.factorise(delta, 4, model[0])
        assert (A2.shape, B2.shape) == (A.shape, B.shape)
        torch.testing.assert_close(kind.compose(A2, B2, shape), delta, atol=1e-4, rtol=1e-4)
        A3, B3 = torch.randn(shape_a), torch.randn(shape_b)
        torch.testing.assert_close(
            kind.compose(*kind.beside(A, B, A3, B3), shape), delta + kind.compose(A3, B3, shape), atol=1e-4, rtol=1e-4
        )
        assert kind.factorise(delta, 400, model[0]) is None


@pytest.mark.parametrize("init", SPECTRAL)
def test_rank_too_high(init: str) -> None:
    with pytest.raises(st.SlimtuneError, match="takes r directions"):
        st.attach(build("linear")[0], st.LoRA(r=7, init=init))


def test_unknown_name() -> None:
    with pytest.raises(st.SlimtuneError, match="init must be one of"):
        st.attach(build("linear")[0], st.LoRA(init="pizza"))


@pytest.mark.parametrize("init", SPECTRAL)
def test_bf16_base(init: str) -> None:
    model, _ = build("linear")
    model.to(torch.bfloat16)
    x = torch.randn(3, 6).bfloat16()
    base = model(x)
    st.attach(model, st.LoRA(r=3, init=init))
    assert {p.dtype for p in ops(model)[0].parameters()} == {torch.float32}
    torch.testing.assert_close(model(x), base, atol=2e-2, rtol=2e-2)


# ---- the reference library -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ours", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_reference_parity(ours: str, theirs: str) -> None:
    import peft
    model, _ = build("linear")
    other, _ = build("linear")
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(other, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=theirs))
    st.attach(model, st.LoRA(r=3, alpha=6, init=ours))
    (op,) = ops(model)
    layer = other.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(op.A.data, A.data, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(op.B.data, B.data, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # the same step from the same start gives the same output, although the bases differ
        for p in (op.A, A):
            p.add_(0.1)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)


# ---- LoftQ -----------------------------------------------------------------------------------------------------------
def quantised(folder: Path, prefix: str = "") -> tuple[nn.Module, nn.Linear]:
    import bitsandbytes as bnb
    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False)
    save_file({f"{prefix}0.weight": plain.weight.data.clone()}, folder / "model.safetensors")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4", module=layer)
    return nn.Sequential(layer.to("cpu")).eval(), plain


@pytest.mark.parametrize("prefix", ["", "model."])
def test_loftq(tmp_path: Path, prefix: str) -> None:
    model, plain = quantised(tmp_path, prefix)
    x = torch.randn(5, 64)
    wanted, base = plain(x), model(x)
    st.attach(model, st.LoRA(r=16, init="loftq", loftq_source=str(tmp_path)))
    (op,) = ops(model)
    assert op.A0 is None
    lost = plain.weight - op.kind.read(model[0], "weight")
    U, S, V = torch.linalg.svd(lost)
    torch.testing.assert_close(op.delta(), U[:, :16] * S[:16] @ V[:16], atol=1e-5, rtol=1e-4)
    assert (model(x) - wanted).norm() < 0.8 * (base - wanted).norm()


def test_loftq_refusals(tmp_path: Path) -> None:
    model, _ = quantised(tmp_path)
    with pytest.raises(st.SlimtuneError, match="needs loftq_source"):
        st.attach(model, st.LoRA(init="loftq"))
    with pytest.raises(st.SlimtuneError, match="is no folder"):
        st.attach(model, st.LoRA(init="loftq", loftq_source=str(tmp_path / "none")))
    with pytest.raises(st.SlimtuneError, match="not quantised"):
        st.attach(build("linear")[0], st.LoRA(init="loftq", loftq_source=str(tmp_path)))
    save_file({"0.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(st.SlimtuneError, match="of shape"):
        st.attach(model, st.LoRA(init="loftq", loftq_source=str(tmp_path)))
    save_file({"other": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(st.SlimtuneError, match="has no tensor"):
        st.attach(model, st.LoRA(init="loftq", loftq_source=str(tmp_path)))
