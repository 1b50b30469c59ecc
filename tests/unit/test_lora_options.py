"""LoRA with A frozen keeps no inputs, kinds of dropout keep the mean, and LoRA+ finds every up factor of every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune as st
from slimtune.core.errors import SpecError
from slimtune.core.op import Op
from slimtune.core.state import state_of
from slimtune.testing.cases import case
from slimtune.testing.zoo import llama

KINDS = ["element", "column", "rank", "module"]


def built(spec: st.Spec, seed: int = 0, a: int = 48, b: int = 32) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(a, b))
    st.attach(model, spec)
    (op,) = state_of(model).adapters["default"].ops.values()
    with torch.no_grad():
        op.B.normal_()
    return model, op


def kept_bytes(run: Callable[[], Tensor], leave: list[Tensor]) -> int:
    """Return the bytes that a forward keeps for backward, without those of `leave`."""
    storages: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in leave}

    def note(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        if s.data_ptr() not in known:
            storages[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run()
    out.sum().backward()
    return sum(storages.values())


# ---- LoRA-FA ----------------------------------------------------------------------------------------------------------
def test_with_a_frozen_no_input_is_kept_and_the_gradient_is_the_same() -> None:
    n, a, b, r = 64, 48, 32, 4
    x = torch.randn(n, a)
    found = {}
    for freeze in ("none", "A"):
        model, op = built(st.LoRA(r=r, freeze=freeze))
        inputs = x.clone().requires_grad_(True)
        kept = kept_bytes(lambda m=model, i=inputs: m(i).tanh(), [*model.parameters(), *model.buffers()])
        found[freeze] = kept, op.B.grad, inputs.grad
    tanh = 4 * n * b
    assert found["none"][0] == tanh + 4 * n * (a + r)
    assert found["A"][0] == tanh + 4 * n * r
    assert torch.equal(found["A"][1], found["none"][1])
    assert torch.equal(found["A"][2], found["none"][2])


def test_with_a_frozen_only_b_trains_and_files_are_those_of_a_lora(tmp_path: Any) -> None:
    model = llama()
    report = st.attach(model, st.LoRA(r=4, freeze="A", targets="q_proj"))
    assert report.trainable == 3 * 4 * 32
    assert all(p.shape == (32, 4) for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for op in state_of(model).adapters["default"].ops.values():
            op.B.normal_()
    st.save(model, tmp_path)
    other = llama()
    st.load(other, tmp_path, trainable=True)
    ids = torch.arange(3, 23)[None]
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == 3 * 4 * 32


# ---- dropout ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_mean_over_masks_is_the_output_without_dropout(kind: str, init: str) -> None:
    model, _ = built(st.LoRA(r=4, init=init, dropout=0.25, dropout_kind=kind), a=12, b=6)
    x = torch.randn(3, 12)
    with torch.no_grad():
        want = model.eval()(x)
        model.train()
        outs = torch.stack([model(x) for _ in range(4000)])
    spread = outs.std(0)
    assert spread.max() > 0.1, "nothing is dropped"
    assert ((outs.mean(0) - want).abs() < 5 * spread / 4000**0.5 + 1e-5).all()


def test_what_each_kind_drops() -> None:
    """With one input each, the mask can be read off the outputs."""
    x = torch.eye(12)
    for kind in KINDS:
        model, _ = built(st.LoRA(r=4, dropout=0.5, dropout_kind=kind), a=12, b=6)
        base = model[0].weight.T + model[0].bias
        torch.manual_seed(5)
        with torch.no_grad():
            delta = model.train()(x) - base  # row j: what input j contributes
        alive = delta.abs().amax(1) > 1e-6
        if kind == "rank":
            left = torch.linalg.matrix_rank(delta, atol=1e-4)
            assert 0 < left < 4
        elif kind == "module":
            assert alive.all() or not alive.any()
        else:
            assert 0 < alive.sum() < 12
    with torch.no_grad():
        model, _ = built(st.LoRA(r=4, dropout=0.5, dropout_kind="column"), a=12, b=6)
        torch.manual_seed(5)
        twice = model.train()(torch.cat([x, x])) - torch.cat([base, base])
    torch.testing.assert_close(twice[:12], twice[12:])  # the same inputs for every token


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_start_at_zero_stays_there_under_every_mask(kind: str, init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).train()
    x = torch.randn(3, 12)
    base = model(x)
    st.attach(model, st.LoRA(r=4, init=init, dropout=0.5, dropout_kind=kind))
    for _ in range(5):
        torch.testing.assert_close(model(x), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["linear", "HF Conv1D", "conv2d grouped", "embedding", "experts", "group 4-bit", "Llama"])
def test_checkpointing_repeats_the_mask(kind: str, where: str) -> None:
    c = case(where)
    if kind == "element" and where == "embedding":
        return  # refused: see below
    model = c.build()
    spec = st.LoRA(r=4, dropout=0.5, dropout_kind=kind, **({} if c.targets is None else {"targets": c.targets}))
    st.attach(model, spec)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.3)
    model.train()
    inputs = c.inputs()
    keep = st.keep_plan(model, checkpoint)
    spark = torch.zeros((), requires_grad=True)

    def call(_: Tensor, *a: Tensor) -> Tensor:
        out = model(*a)
        return out if isinstance(out, Tensor) else out[0]

    grads, outs = [], []
    for run in (call, lambda *a: keep(call, *a, use_reentrant=False), lambda *a: keep(call, *a, use_reentrant=True)):
        torch.manual_seed(11)
        out = run(spark, *inputs)
        outs.append(out.detach())
        torch.autograd.backward(out.square().sum())
        grads.append([p.grad for p in params])
        for p in params:
            p.grad = None
    for out, found in zip(outs[1:], grads[1:], strict=True):
        assert torch.equal(out, outs[0])
        for g, w in zip(found, grads[0], strict=True):
            torch.testing.assert_close(g, w)

    def again(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(spark, *inputs)

    assert any(not torch.equal(again(seed), outs[0]) for seed in range(12, 24)), "every seed gives the same mask"


def test_rows_are_masked_each_by_its_own_adapter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6)).train()
    for name, kind in (("a", "rank"), ("b", "module")):
        st.attach(model, st.LoRA(r=4, dropout=0.5, dropout_kind=kind), name=name)
        (op,) = state_of(model).adapters[name].ops.values()
        with torch.no_grad():
            op.B.normal_()
    x = torch.randn(3, 12)
    with torch.no_grad(), st.use(model, rows=["a", None, "b"]):
        outs = torch.stack([model(x) for _ in range(50)])
    assert torch.equal(outs[:, 1], outs[:1, 1].expand(50, -1))
    assert len(outs[:, 2].round(decimals=4).unique(dim=0)) == 2  # with the adapter or without
    assert len(outs[:, 0].round(decimals=4).unique(dim=0)) > 2


def test_refusals() -> None:
    with pytest.raises(SpecError, match="dropout_kind must be one of element"):
        st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA(dropout_kind="columns"))
    with pytest.raises(SpecError, match="freeze must be none or A"):
        st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA(freeze="B"))
    with pytest.raises(SpecError, match="cannot be dropped"):
        st.attach(nn.Sequential(nn.Embedding(4, 4)), st.LoRA(dropout=0.1, targets="embedding"))
    for kind in KINDS:
        with pytest.raises(SpecError, match="dropped"):
            st.attach(nn.Sequential(nn.MultiheadAttention(8, 2)), st.LoRA(dropout=0.1, dropout_kind=kind))


# ---- LoRA+ ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", list(st.methods()))
def test_up_factors_get_their_own_rate_whatever_the_method(method: str) -> None:
    from slimtune.core.registry import spec_class

    model = llama()
    st.attach(model, spec_class(method)())
    up = {
        id(t)
        for adapter in state_of(model).adapters.values()
        for op in adapter.ops.values()
        for part in op.modules()
        if isinstance(part, Op)
        for name, t in part.tensors()
        if part.roles[name] == "up"
    }
    groups = st.param_groups(model, lr=1e-3, up_ratio=16, weight_decay=0.1)
    fast = {id(p) for g in groups if g["lr"] == pytest.approx(16e-3) for p in g["params"]}
    assert fast == up
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_up_factors_inside_dora_are_found() -> None:
    model = llama()
    st.attach(model, st.DoRA())
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in st.param_groups(model, lr=1.0, up_ratio=16, weight_decay=0.1)}
    assert {k: len(v) for k, v in groups.items()} == {(1.0, 0.1): 21, (16.0, 0.1): 21, (1.0, 0.0): 21}
