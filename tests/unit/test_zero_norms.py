"""Rows of zeros in the base: forward and merge agree, and gradients are finite, whatever a method divides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import DataError
from slimtune.core.registry import spec_class
from slimtune.core.spec import Spec
from slimtune.testing.cases import case
from slimtune.testing.subject import Subject, bits, fill, run
from slimtune.testing.suite import expected_problem

KINDS = ("linear", "HF Conv1D", "conv2d", "conv2d grouped", "embedding", "MultiheadAttention packed", "experts", "LayerNorm")


def zeroed(s: Subject, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the case's model with some outputs of every weight at zero, as in released checkpoints."""
    model = s.case.build(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p[1 : max(2, p.shape[0] // 3)] = 0
            if p.dim() == 2:
                p[:, 2] = 0  # Conv1D and embeddings count outputs along the other axis
    return model


def subjects() -> list[tuple[Spec, str]]:
    own = [method for method in st.methods() if spec_class(method).__module__.startswith("slimtune.")]  # other tests register some
    specs = [spec_class(method)() for method in own]
    specs += [st.DoRA(of=st.VeRA()), st.DoRA(of=st.Dense()), st.DoRA(of=st.LoRA(r=4, init="pissa"))]
    return [(spec, kind) for spec in specs for kind in KINDS if not expected_problem(Subject(spec, case(kind)))]


@pytest.mark.parametrize("busy", [False, True], ids=["start", "trained"])
@pytest.mark.parametrize(("spec", "kind"), subjects(), ids=str)
def test_forward_gradients_and_merge_on_rows_of_zeros(spec: Spec, kind: str, busy: bool) -> None:
    s = Subject(spec, case(kind))
    model = zeroed(s)
    s.attached("a", model=model, busy=False)
    if busy:
        for op in s.ops(model, "a").values():
            for name, p in op.named_parameters():
                if not name.endswith("B"):  # an update that leaves rows of zeros as they are, with all else away from its start
                    nn.init.normal_(p, std=0.3)
    out = run(model, s.case.inputs())
    assert bool(out.isfinite().all())
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is None or bool(p.grad.isfinite().all()), name
    want = s.out(model)
    if s.can_merge(model):
        st.merge(model)
        s.close(s.out(model), want, "merged output on rows of zeros")
        for name, p in model.named_parameters():
            assert bool(p.isfinite().all()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_dora_on_rows_of_zeros_trains_merges_and_gives_the_base_back(dtype: torch.dtype) -> None:
    s = Subject(st.DoRA(of=st.LoRA(r=2)), case("linear"))
    model = zeroed(s, dtype)
    base = s.out(model, dtype=dtype)
    before = bits(model)
    s.attached("a", model=model, busy=False)
    s.close(s.out(model, dtype=dtype), base, "start", 1e-2 if dtype.itemsize == 2 else 1e-6)
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.02))
    for _ in range(5):
        model(*s.case.inputs(dtype=dtype)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    want = s.out(model, dtype=dtype)
    assert bool(want.isfinite().all())
    assert not torch.equal(want, base)
    st.merge(model)
    s.close(s.out(model, dtype=dtype), want, "merged", {2: 3e-2, 4: 1e-5, 8: 1e-10}[dtype.itemsize])
    st.unmerge(model)
    assert {k: v for k, v in bits(model).items() if "slim" not in k} == before


def test_fused_and_plain_forms_of_dora_give_the_same_gradients_on_rows_of_zeros() -> None:
    """The fused form gets what was before a gain back by dividing by it; where gains are 0 it must not be taken."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False))
        with torch.no_grad():
            model[0].weight[2] = 0
        st.attach(model, st.DoRA(of=st.LoRA(r=2)))
        fill(model, "default")
        op: Any = model.slim_state.adapters["default"].ops["0", "weight"]
        with torch.no_grad():
            op.m[2] = 0  # as it starts on a row of zeros; the update has moved the row by now
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if not fused else torch.enable_grad():
            (model(x) * torch.arange(5.0)).sum().backward()
        found.append([p.grad.clone() for p in op.parameters()])
        assert op.m.grad[2] != 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_spectral_starts_on_a_weight_of_zeros_still_train() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    nn.init.zeros_(model[0].weight)
    st.attach(model, st.LoRA(r=2, init="pissa"))
    model(torch.randn(3, 8)).sub(1).square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_corda_refuses_inputs_of_zeros_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(DataError, match="zero") as found:
        st.attach(model, st.LoRA(r=2, init="corda", targets=("0",)), data=[torch.zeros(4, 8)])
    assert "0" in found.value.where
    assert "slim_state" not in model.__dict__
