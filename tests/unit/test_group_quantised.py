"""A group-wise 4-bit base: what it computes and keeps, and QA-LoRA's merge into its zero points, exact to the code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import SlimtuneError, SpecError, TargetError
from slimtune.core.state import state_of
from slimtune.ports.group_quantised import GroupLinear, pack, quantise, quantise_groups, unpack
from slimtune.testing.zoo import llama


def layer(a: int = 128, b: int = 48, group: int = 32, seed: int = 0) -> tuple[nn.Linear, GroupLinear]:
    torch.manual_seed(seed)
    plain = nn.Linear(a, b)
    return plain, GroupLinear(plain, group)


def adapted(spec: st.Spec, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 48))
    quantise(model, 32)
    model.to(dtype)
    st.attach(model, spec)
    (op,) = state_of(model).adapters["default"].ops.values()
    with torch.no_grad():
        for p in op.parameters():
            p.normal_(std=0.1)
    return model, op


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in base_state_dict(model).items()}


# ---- the layer --------------------------------------------------------------------------------------------------------
def test_quantising_is_its_formula() -> None:
    plain, quantised = layer()
    W, V = plain.weight.detach(), quantised.dense()
    groups, back = W.unflatten(1, (-1, 32)), V.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / 15
    assert ((back - groups).abs() <= 0.5 * step[..., None] + 1e-6).all()
    torch.testing.assert_close(back.amax(2), groups.amax(2))
    torch.testing.assert_close(back.amin(2), groups.amin(2))
    q = quantised.codes().double().unflatten(1, (-1, 32))
    torch.testing.assert_close(V.double(), ((q - quantised.zeros[..., None].double()) * quantised.scales[..., None].double()).flatten(1))
    assert q.min() == 0
    assert q.max() == 15


def test_codes_survive_packing_and_a_flat_group_is_exact() -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    assert pack(codes).dtype == torch.int8
    assert torch.equal(unpack(pack(codes)), codes)
    W = torch.full((2, 32), -0.37)
    q, s, z = quantise_groups(W, 32)
    torch.testing.assert_close((q.float() - z) * s, W, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_backward_are_those_of_the_dense_layer(dtype: torch.dtype) -> None:
    plain, quantised = layer()
    plain.weight.data = quantised.dense()
    plain, quantised = plain.to(dtype), nn.Sequential(quantised).to(dtype)[0]
    assert quantised.scales.dtype == quantised.zeros.dtype == torch.float32
    x = torch.randn(3, 5, 128, dtype=dtype)
    found = []
    for m in (plain, quantised):
        xi = x.clone().requires_grad_(True)
        y = m(xi)
        assert y.dtype == dtype
        y.square().sum().backward()
        found.append((y, xi.grad))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=tolerance * float(want.abs().max()), rtol=0)


def test_no_dense_weight_is_kept_for_backward() -> None:
    _, quantised = layer(256, 256)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
        quantised(torch.randn(2, 256, requires_grad=True))
    assert max(sizes) <= 256 * 256 // 2


def test_copies_state_dicts_and_compiled(tmp_path: Path) -> None:
    plain, quantised = layer()
    x = torch.randn(3, 128)
    want = quantised(x)
    assert torch.equal(copy.deepcopy(quantised)(x), want)
    save_file(quantised.state_dict(), tmp_path / "layer.safetensors")
    other = GroupLinear(nn.Linear(128, 48), 32)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), want)
    torch.testing.assert_close(torch.compile(quantised, fullgraph=True, backend="aot_eager")(x), want)
    bits = 8 * sum(t.numel() * t.element_size() for n, t in quantised.state_dict().items() if n != "bias") / plain.weight.numel()
    assert bits == 6


def test_quantise_a_model() -> None:
    model = llama()
    paths = quantise(model, 32, exclude="down_proj")
    assert len(paths) == 3 * 6
    assert isinstance(model.lm_head, nn.Linear)
    assert st.attach(model, st.QALoRA()).total - st.report(model).trainable == sum(p.numel() for p in llama().parameters())
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()
    with pytest.raises(TargetError, match=r"plain nn\.Linear"):
        quantise(model, 32)


@pytest.mark.parametrize(("group", "words"), [(48, "does not fit"), (1, "does not fit"), (64, "does not fit")])
def test_a_group_that_does_not_fit_changes_nothing(group: int, words: str) -> None:
    model = llama()
    with pytest.raises(SpecError, match=words) as caught:
        quantise(model, group)
    assert "layers.0" in caught.value.where
    assert not any(isinstance(m, GroupLinear) for m in model.modules())


# ---- QA-LoRA ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_qa_lora_is_its_formula(pool: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 10)).double()
    st.attach(model, st.QALoRA(r=3, alpha=6, group=8, pool=pool))
    (op,) = state_of(model).adapters["default"].ops.values()
    assert op.A.shape == (3, 3)
    with torch.no_grad():
        op.B.normal_()
    x = torch.randn(4, 24, dtype=torch.float64)
    groups = x.view(4, 3, 8)
    pooled = groups.sum(2) if pool == "sum" else groups.mean(2)
    torch.testing.assert_close(model(x), model[0].weight.matmul(x.T).T + model[0].bias + 2.0 * pooled @ op.A.T @ op.B.T)
    A, B = op.pair()
    torch.testing.assert_close(B @ A, op.delta())


@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("group", [None, 64])
def test_merging_moves_zero_points_and_nothing_else(pool: str, group: int | None) -> None:
    model, op = adapted(st.QALoRA(pool=pool, group=group))
    x = torch.randn(7, 128)
    live, before, base = model(x), kept(model), nn.Sequential(model[0])
    W = base[0].dense().double() + op.delta().double()
    st.merge(model)
    after = kept(model)
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"0.zeros"}
    assert ((model(x) - live).abs().max() / live.abs().max()) < 1e-6
    assert ((model[0].dense() - W).abs().max() / W.abs().max()) < 1e-6
    st.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in kept(model).items())
    assert torch.equal(model(x), live)


def test_stacks_and_sums_of_qa_loras_merge_exactly_too() -> None:
    model, _ = adapted(st.QALoRA())
    st.attach(model, st.QALoRA(r=4), name="b")
    (op,) = state_of(model).adapters["b"].ops.values()
    with torch.no_grad():
        op.B.normal_(std=0.1)
    before = kept(model)
    x = torch.randn(7, 128)
    for which in (["default", "b"], {"default": 0.7, "b": -0.4}):
        with st.use(model, which):
            live = model(x)
        st.merge(model, which)
        assert torch.equal(model[0].weight, before["0.weight"])
        assert torch.equal(model[0].scales, before["0.scales"])
        assert ((model(x) - live).abs().max() / live.abs().max()) < 1e-6
        st.unmerge(model)


def test_the_merged_model_is_saved_in_four_bits(tmp_path: Path) -> None:
    model, _ = adapted(st.QALoRA())
    st.merge(model)
    x = torch.randn(7, 128)
    want = model(x)
    save_file(model.state_dict(), tmp_path / "merged.safetensors")
    other = nn.Sequential(nn.Linear(128, 48))
    quantise(other, 32)
    other.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.equal(other(x), want)


def test_zero_points_hold_the_merge_below_a_half_precision_model() -> None:
    model, op = adapted(st.QALoRA(), torch.bfloat16)
    W = model[0].dense().double() + op.delta().double()
    st.merge(model)
    assert ((model[0].dense() - W).abs().max() / W.abs().max()) < 1e-6


def test_a_plain_lora_merges_by_quantising_again() -> None:
    model, op = adapted(st.LoRA(r=4))
    before = kept(model)
    W = model[0].dense() + op.delta()
    st.merge(model)
    after = kept(model)
    assert not torch.equal(after["0.weight"], before["0.weight"])
    off = (model[0].dense() - W).unflatten(1, (-1, 32)).abs()
    assert off.max() > 1e-3
    assert (off <= 0.5 * model[0].scales[..., None] + 1e-6).all()
    st.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in kept(model).items())


def test_bias_merges_beside_the_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 48, bias=False))
    quantise(model, 32)
    st.attach(model, st.BitFit(missing="add"))
    (op,) = state_of(model).adapters["default"].ops.values()
    with torch.no_grad():
        op.d.normal_()
    x = torch.randn(7, 128)
    live = model(x)
    st.merge(model)
    assert model[0].bias.dtype == torch.float32
    torch.testing.assert_close(model(x), live)
    st.unmerge(model)
    assert model[0].bias is None


def test_qa_lora_refuses_what_would_not_merge_exactly() -> None:
    cases: list[tuple[nn.Module, st.Spec, str]] = [
        (nn.Sequential(layer()[1]), st.QALoRA(group=16), "no multiple of the base's groups of 32"),
        (nn.Sequential(nn.Linear(20, 4)), st.QALoRA(group=16), "does not divide the 20 inputs"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), st.QALoRA(targets="conv"), "which a convolution is not"),
        (nn.Sequential(nn.Linear(4, 4)), st.QALoRA(pool="max", r=0), "pool must be one of sum, mean"),
    ]
    for model, spec, words in cases:
        with pytest.raises(SlimtuneError, match=words) as caught:
            st.attach(model, spec)
        assert caught.value.hint


@pytest.mark.parametrize("trained_on", ["4 bits", "plain"])
@pytest.mark.parametrize("loaded_on", ["4 bits", "plain"])
def test_an_adapter_acts_the_same_on_either_base_and_from_either_file(trained_on: str, loaded_on: str, tmp_path: Path) -> None:
    def base(kind: str) -> nn.Module:
        model = llama()
        if kind == "4 bits":
            quantise(model, 32)
        return model.eval()

    def filled(kind: str) -> nn.Module:
        model = base(kind)
        st.attach(model, st.QALoRA(group=32))
        values = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.slim_state.adapters["default"].parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=values))
        return model.eval()

    ids = torch.arange(6).view(2, 3)
    st.save(filled(trained_on), tmp_path)
    loaded = base(loaded_on)
    st.load(loaded, tmp_path)
    with torch.no_grad():
        out, wanted, bare = (model(ids).logits for model in (loaded, filled(loaded_on), base(loaded_on)))
    assert torch.equal(out, wanted)
    assert not torch.allclose(out, bare, atol=1e-3)
