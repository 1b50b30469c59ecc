"""Methods that act at optimiser steps: whose steps count, in which loops, and what copies keep."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core import registry, stepping
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import SlimtuneError, SpecError
from slimtune.core.state import state_of
from slimtune.core.trained import set_values
from slimtune.methods.lora import LoRA

CALLS: list[tuple[str, str, int]] = []


@dataclass(frozen=True, kw_only=True)
class Watcher(LoRA):
    """A LoRA that writes down when it is called."""

    def before_step(self, step: stepping.Step) -> None:
        assert not torch.is_grad_enabled()
        CALLS.append(("before", step.adapter.name, step.number))

    def after_step(self, step: stepping.Step) -> None:
        CALLS.append(("after", step.adapter.name, step.number))


Watcher.method = "watcher"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._SPECS, "watcher", Watcher)  # for these tests only
    CALLS.clear()


def model(*names: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for name in names:
        st.attach(made, Watcher(r=2), name=name)
    return made


def backward(m: nn.Module) -> None:
    m(torch.randn(4, 6)).square().sum().backward()


def sgd(m: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)


def steps(m: nn.Module, name: str = "a") -> int:
    return state_of(m).adapters[name].steps


def test_before_and_after_each_step_of_the_optimiser() -> None:
    m = model("a")
    o = sgd(m)
    for _ in range(2):
        for _ in range(3):  # accumulation
            backward(m)
        o.step()
        o.zero_grad()
    assert CALLS == [("before", "a", 1), ("after", "a", 1), ("before", "a", 2), ("after", "a", 2)]
    assert steps(m) == 2


def test_only_the_adapters_that_this_optimiser_moves_count() -> None:
    m, other = model("a", "b"), model("a")
    st.trainable(m, ["a", "b"])
    o = torch.optim.SGD(st.param_groups(m, lr=0.1))
    with st.use(m, "a"):
        backward(m)
    o.step()
    o.zero_grad()
    assert CALLS == [("before", "a", 1), ("after", "a", 1)]
    with st.use(m, ["a", "b"]):
        backward(m)
    o.step()
    o.zero_grad()
    assert (steps(m, "a"), steps(m, "b")) == (2, 1)
    st.use(m, "b")  # a is frozen now, though the optimiser holds it still
    backward(m)
    o.step()
    assert (steps(m, "a"), steps(m, "b"), steps(other)) == (2, 2, 0)


def test_one_optimiser_of_two_models() -> None:
    m, n = model("a"), model("a")
    o = torch.optim.Adam([p for x in (m, n) for p in x.parameters() if p.requires_grad])
    backward(m)
    backward(n)
    o.step()
    assert CALLS == [("before", "a", 1)] * 2 + [("after", "a", 1)] * 2


def test_a_step_without_gradients_or_after_detach_is_none() -> None:
    m = model("a", "b")
    o = sgd(m)
    o.step()
    assert CALLS == []
    backward(m)
    st.detach(m, "b")
    o.step()
    assert CALLS == []


def test_a_step_that_fails_does_not_count_and_does_no_harm() -> None:
    m = model("a")

    class Breaks(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise MemoryError
            return super().step(closure)

    o, other = Breaks([p for p in m.parameters() if p.requires_grad], lr=0.1), sgd(m)
    backward(m)
    with pytest.raises(MemoryError):
        o.step()
    assert steps(m) == 0
    other.step()
    assert steps(m) == 1
    o.broken = False
    o.step()
    assert steps(m) == 2


def test_an_optimiser_inside_another_counts_once() -> None:
    m = model("a")

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            super().__init__([p for g in inner.param_groups for p in g["params"]], {})

        def step(self, closure=None):
            self.inner.step()
            self.inner.step()

    o = Outer(sgd(m))
    backward(m)
    o.step()
    assert CALLS == [("before", "a", 1), ("after", "a", 1)]


def test_closures() -> None:
    m = model("a")
    params = [p for p in m.parameters() if p.requires_grad]
    x = torch.randn(4, 6)

    def closure() -> torch.Tensor:
        for p in params:
            p.grad = None
        loss = m(x).square().sum()
        loss.backward()
        return loss

    o = torch.optim.LBFGS(params, lr=0.1, max_iter=3)
    o.step(closure)
    o.step(closure=closure)
    assert [c for c in CALLS if c[0] == "after"] == [("after", "a", 1), ("after", "a", 2)]
    assert {n for kind, _, n in CALLS if kind == "before"} == {1, 2}


def test_a_skipped_step_of_a_fused_optimiser() -> None:
    m = model("a")
    o = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, fused=True)
    backward(m)
    o.found_inf, o.grad_scale = torch.ones(1), torch.tensor(8.0)  # as GradScaler tells a fused optimiser
    o.step()
    assert steps(m) == 0
    o.found_inf = torch.zeros(1)
    o.step()
    assert steps(m) == 1


def test_grad_scaler() -> None:
    m = model("a")
    o = sgd(m)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(m(torch.randn(4, 6)).square().sum()).backward()
    next(p for p in m.parameters() if p.grad is not None).grad.fill_(float("inf"))
    scaler.step(o)
    scaler.update()
    assert steps(m) == 0
    o.zero_grad()
    scaler.scale(m(torch.randn(4, 6)).square().sum()).backward()
    scaler.step(o)
    assert steps(m) == 1


def test_accelerate() -> None:
    import accelerate
    m = model("a")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, o = accelerator.prepare(m, sgd(m))
    for _ in range(4):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(torch.randn(4, 6)).square().sum())
            o.step()
            o.zero_grad()
    assert steps(m) == 2


def test_copies_and_files_keep_the_count_and_act_themselves(tmp_path) -> None:
    m = model("a")
    o = sgd(m)
    backward(m)
    o.step()
    st.save(m, tmp_path / "a")
    loaded = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    loaded.load_state_dict(base_state_dict(m))
    st.load(loaded, tmp_path / "a", name="a", trainable=True)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        CALLS.clear()
        assert steps(twin) == 1
        backward(twin)
        sgd(twin).step()
        assert CALLS == [("before", "a", 2), ("after", "a", 2)]
        assert (steps(twin), steps(m)) == (2, 1)


@pytest.mark.parametrize(
    "spec",
    [
        st.AdaLoRA(init_r=4, target_r=2, delta_t=2, t_init=1, t_final=3, total_steps=12),
        st.DeltaLoRA(r=2, start=4),
        st.ProgressiveLoRA(r=1, by=1, every=2, max_r=4, shrink_at=8, energy=0.5),
        st.LoRA(r=2),
    ],
    ids=lambda s: s.method,
)
@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_checkpoint_goes_on_to_the_bit(spec: st.Spec, at: int, tmp_path) -> None:
    from slimtune.train.checkpoint import read_tensors, write_tensors

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        m = model()
        torch.manual_seed(1)
        st.attach(m, spec, name="a")
        return m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02)

    def go(m: nn.Module, o: torch.optim.Optimizer, first: int, last: int) -> None:
        for i in range(first, last):
            m(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            o.step()
            o.zero_grad()

    whole, o = fresh()
    go(whole, o, 0, at)
    write_tensors(whole, "a", tmp_path)
    saved = copy.deepcopy(o.state_dict())
    go(whole, o, at, 12)
    again, o = fresh()
    read_tensors(again, "a", tmp_path)
    o.load_state_dict(saved)
    go(again, o, at, 12)
    for mine, theirs in zip(state_of(again).adapters["a"].ops.values(), state_of(whole).adapters["a"].ops.values(), strict=True):
        assert mine.settings() == theirs.settings()
        for (name, t), (_, u) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(t, u), name
    other = model()
    st.attach(other, st.BitFit(), name="a")
    with pytest.raises(SlimtuneError, match="another model or method"):
        read_tensors(other, "a", tmp_path)


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before = len(stepping._WATCHED)
    m = model("a")
    assert len(stepping._WATCHED) == before + 1
    backward(m)
    sgd(m).step()
    del m
    gc.collect()
    assert len(stepping._WATCHED) == before
    st.attach(nn.Sequential(nn.Linear(4, 4)), st.LoRA())
    assert len(stepping._WATCHED) == before, "a method that does not act is not watched"


def test_parameters_in_two_optimisers_are_refused() -> None:
    m = model("a")
    params = [p for p in m.parameters() if p.requires_grad]
    backward(m)
    with pytest.raises(SpecError, match="are not in this SGD") as caught:
        torch.optim.SGD(params[:2], lr=0.1).step()
    assert caught.value.hint
    assert "'a'" in caught.value.where


def test_training_past_torch_optimisers_is_noticed() -> None:
    m = model("a")
    params = [p for p in m.parameters() if p.requires_grad]

    def by_hand() -> None:
        backward(m)
        for p in params:
            p.data.add_(p.grad, alpha=-0.1)
            p.grad = None

    by_hand()
    with pytest.warns(UserWarning, match="not by a torch optimiser"):
        by_hand()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_hand()  # told once
        m = model("a")
        o = sgd(m)
        for _ in range(3):
            backward(m)
            o.step()
            o.zero_grad()
        backward(m)
        backward(m)


def test_dora_refuses_what_acts() -> None:
    with pytest.raises(SlimtuneError, match="acts while it trains"):
        st.attach(nn.Sequential(nn.Linear(4, 4)), st.DoRA(of=st.AdaLoRA(total_steps=9)))


def test_set_values_keeps_the_object_while_an_old_graph_lives() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    loss = (p * 2).sum()
    loss.backward()  # the graph stays alive with `loss`, as in most loops
    version = p._version
    set_values(p, torch.full((4, 3), 5.0))
    assert p._version > version
    (p * torch.ones(4, 3)).sum().backward()
    assert p.grad is not None
    assert p.grad.shape == (4, 3)
    assert loss.item() == 12
