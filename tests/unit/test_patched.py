"""Forwards that stand on the instance, weights that are computed, and tools of torch that look into what is called."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import slimtune as st


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x).transpose(1, 2)).transpose(1, 2).tanh())  # type: ignore[no-any-return]


def net(spec: Any = None, prepare: Callable[[nn.Module], Any] | None = None) -> Any:
    torch.manual_seed(0)
    model = Net().eval()
    if prepare is not None:
        prepare(model.a)
    if spec is not None:
        adapt(model, spec)
    return model


def adapt(model: nn.Module, spec: Any) -> None:
    st.attach(model, spec)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".slim." in f".{name}":
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
LORA = st.LoRA(r=2, targets="a")


def double(self: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.Linear.forward(self, x)


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_of_the_instance_is_gone_around(first: bool) -> None:
    change = net(LORA).a(X) - net().a(X)
    model = net()
    if first:
        model.a.forward = MethodType(double, model.a)
    adapt(model, LORA)
    if not first:
        model.a.forward = MethodType(double, model.a)
    torch.testing.assert_close(model.a(X), 2 * net().a(X) + change)
    st.detach(model, "default")
    assert torch.equal(model.a(X), 2 * net().a(X))
    assert model.a.__dict__["forward"] == MethodType(double, model.a)


def test_a_wrapper_of_the_adapted_forward_stays_outside() -> None:
    model = net(LORA)
    inner = model.a.forward
    model.a.forward = lambda x: 2 * inner(x)
    assert torch.equal(model.a(X), 2 * net(LORA).a(X))
    st.detach(model, "default")
    assert torch.equal(model.a(X), 2 * net().a(X))
    adapt(model, LORA)
    assert torch.equal(model.a(X), 2 * net(LORA).a(X))
    del model.a.forward
    assert torch.equal(model.a(X), net(LORA).a(X))


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm, "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm, "prune": lambda m: prune.l1_unstructured(m, "weight", 0.3),
}  # fmt: skip


@pytest.mark.parametrize("spec", [LORA, st.DoRA(of=LORA), st.Dense(targets="a")], ids=lambda s: s.method)
@pytest.mark.parametrize("computed", COMPUTED)
def test_computed_weights(computed: str, spec: Any, tmp_path: Any) -> None:
    prepare = COMPUTED[computed]
    model = net(prepare=prepare)
    bare, cls = model(X), type(model.a)
    adapt(model, spec)
    want = model(X)
    assert (want - bare).abs().max() > 1e-3
    want.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(copy.deepcopy(model)(X), want)
    st.save(model, tmp_path)
    loaded = net(prepare=prepare)
    st.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(X), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(st.MergeError, match="make it a plain weight first"):
        st.merge(model)
    st.detach(model, "default")
    torch.testing.assert_close(model(X), bare)
    assert type(model.a) is cls


def test_the_hint_on_computed_weights_works() -> None:
    model = net(LORA, parametrizations.weight_norm)
    want = model(X)
    parametrize.remove_parametrizations(model.a, "weight")
    torch.testing.assert_close(model(X), want)
    st.merge(model)
    torch.testing.assert_close(model(X), want)
    st.unmerge(model)
    st.detach(model, "default")
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize("targets", ["0", "1"])
def test_lazy_modules_are_refused_before_anything_changes(targets: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(4))
    with pytest.raises(st.SiteError, match="call the model once before"):
        st.attach(model, st.LoRA(r=2, targets=targets))
    assert "slim_state" not in model.__dict__
    assert model(X).shape == (2, 5, 4)
    st.attach(model, st.LoRA(r=2, targets=targets))


SPECS: list[Any] = [st.LoRA(r=2, targets=("a", "b", "c")), st.DoRA(of=st.LoRA(r=2, targets=("a", "b"))), st.VeRA(r=2, targets=("a", "b"))]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.method)
def test_functional_transforms_over_adapters(spec: Any) -> None:
    model = net(spec)
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def call(p: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(model, p, (x,))

    many = {name: torch.stack([p, 2 * p]) for name, p in own.items()}
    each = torch.stack([call({name: p[i] for name, p in many.items()}, X) for i in range(2)])
    torch.testing.assert_close(vmap(call, in_dims=(0, None))(many, X), each)
    found = grad(lambda p: call(p, X).square().sum())(own)
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.method)
def test_tracing(spec: Any) -> None:
    model, file = net(spec), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (X,), check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(2 * X), model(2 * X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(2 * X), model(2 * X))


def test_a_trunk_of_two_models_is_adapted_by_one() -> None:
    trunk = nn.Linear(4, 4)
    one, two = nn.Sequential(trunk), nn.Sequential(trunk)
    st.attach(one, st.LoRA(r=2, targets="0"))
    with pytest.raises(st.SiteError, match="adapters of another model"):
        st.attach(two, st.LoRA(r=2, targets="0"))
    assert "slim_state" not in two.__dict__
