"""Properties every kind of module must have, shared by the tests of the ports."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def randomise(model: nn.Module, name: str, std: float = 0.2) -> None:
    """Move an adapter away from its start."""
    with torch.no_grad():
        for i, p in enumerate(model.slim_state.adapters[name].parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i + len(name))).to(p) * std)


def check_all(model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any, spec: st.Spec, tol: float = 1e-5) -> None:
    """Identity at the start, disabled, merge, unmerge, deepcopy, pickle, state dict, gradients, detach."""
    kind = type(model)
    model.eval().requires_grad_(False)  # matmul picks its kernel by this flag, even without gradients: the last bits depend on it
    keys = list(model.state_dict())
    with torch.no_grad():
        base = first(call(model, batch)).clone()
    bits = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    st.attach(model, spec, name="a")
    assert list(base_state_dict(model)) == keys
    torch.testing.assert_close(first(call(model, batch)), base, atol=tol, rtol=tol)
    randomise(model, "a")
    live = first(call(model, batch)).detach().clone()
    assert (live - base).abs().max() > 1e-3, "the adapter does nothing"
    with st.disabled(model), torch.no_grad():
        assert torch.equal(first(call(model, batch)), base)
    st.merge(model, "a")
    added = [k for k in base_state_dict(model) if k not in keys]
    assert all(k.endswith("bias") for k in added), "a merge adds nothing but biases that were missing"
    torch.testing.assert_close(first(call(model, batch)).detach(), live, atol=tol, rtol=tol)
    with st.disabled(model), torch.no_grad():
        assert torch.equal(first(call(model, batch)), base)
    torch.testing.assert_close(first(call(model, batch)).detach(), live, atol=tol, rtol=tol)
    st.unmerge(model)
    assert list(base_state_dict(model)) == keys
    assert all(torch.equal(v, bits[k]) for k, v in base_state_dict(model).items() if k in bits)
    assert torch.equal(first(call(model, batch)).detach(), live)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(call(twin, batch)).detach(), live)
    model.train()
    model.slim_state.adapters["a"].set_live(True)
    first(call(model, batch)).square().sum().backward()
    grads = [p.grad for p in model.slim_state.adapters["a"].parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0
    assert all(p.grad is None for n, p in model.named_parameters() if ".slim." not in f".{n}")
    model.eval()
    st.detach(model, "a")
    assert type(model) is kind
    with torch.no_grad():
        assert torch.equal(first(call(model, batch)), base)


def check_rows(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any, rows_of: Callable[[Any, slice], Any], spec: st.Spec,
    out_dim: int = 0, tol: float = 1e-5,
) -> None:  # fmt: skip
    """A batch of four rows with different adapters gives each row what it gets alone."""
    model.eval()
    for name in "ab":
        st.attach(model, spec, name=name)
        randomise(model, name)
    plans = ["a", None, {"a": 0.5, "b": 0.25}, "b"]
    with torch.no_grad():
        with st.use(model, rows=plans):
            mixed = first(call(model, batch))
        for i, which in enumerate(plans):
            with st.use(model, which):
                alone = first(call(model, rows_of(batch, slice(i, i + 1))))
            n = mixed.shape[out_dim] // 4
            torch.testing.assert_close(mixed.narrow(out_dim, i * n, n), alone, atol=tol, rtol=tol)
        with st.use(model, rows=["a", "a", None, None]):
            halves = first(call(model, batch))
        with st.use(model, "a"):
            n = halves.shape[out_dim] // 2
            alone = first(call(model, rows_of(batch, slice(0, 2))))
        torch.testing.assert_close(halves.narrow(out_dim, 0, n), alone, atol=tol, rtol=tol)
    for name in "ab":
        st.detach(model, name)


def check_gradients(model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any, spec: st.Spec) -> None:
    """gradcheck in float64 of every tensor of the ops, and of a float input."""
    model = model.double().eval()
    st.attach(model, spec, name="a")
    randomise(model, "a")
    params = list(model.slim_state.adapters["a"].parameters())
    assert all(p.dtype == torch.float64 for p in params)
    inputs = [batch.double().requires_grad_()] if isinstance(batch, Tensor) and batch.is_floating_point() else []

    def run(*values: Tensor) -> Tensor:
        return first(call(model, values[0] if inputs else batch))

    assert torch.autograd.gradcheck(run, (*inputs, *params), fast_mode=False, atol=1e-6)
    st.detach(model, "a")


def check_bf16(model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any, spec: st.Spec) -> None:
    """A bf16 base with float32 parameters: finite, output in bf16, trains."""
    model = model.to(torch.bfloat16)
    st.attach(model, spec, name="a")
    params = list(model.slim_state.adapters["a"].parameters())
    assert {p.dtype for p in params} == {torch.float32}
    optimiser = torch.optim.SGD(params, lr=0.05)
    losses = []
    for _ in range(4):
        out = first(call(model, batch))
        assert out.dtype == torch.bfloat16
        loss = (out.float() - 1).square().mean()
        assert torch.isfinite(loss)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    st.detach(model, "a")


def put_factors(op: nn.Module, A: Tensor, B: Tensor) -> None:
    """Give a LoRA op the factors of another library."""
    op.A = nn.Parameter(op.kind.adopt(A.detach().clone(), B), requires_grad=op.A.requires_grad)
    op.B = nn.Parameter(B.detach().clone(), requires_grad=op.B.requires_grad)
