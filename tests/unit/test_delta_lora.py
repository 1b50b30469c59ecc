"""Delta-LoRA equals the loop of the paper, which writes into the base, step by step; its files and merges are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import SpecError
from slimtune.core.state import state_of

OPTIMISERS: dict[str, Any] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.1),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def ops(model: nn.Module) -> dict[str, Any]:
    return {path: op for (path, _), op in state_of(model).adapters["default"].ops.items()}


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 7, generator=draw, dtype=torch.float64), torch.randn(8, 4, generator=draw, dtype=torch.float64)) for _ in range(n)]


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_equal_to_the_loop_that_writes_the_base(kind: str, start: int, init: str) -> None:
    ratio, steps = 0.7, 10
    model = net()
    st.attach(model, st.DeltaLoRA(r=3, alpha=5, ratio=ratio, start=start, init=init))
    s = 5 / 3
    W = {p: model.get_submodule(p).weight.detach().clone() for p in ("0", "2")}
    b = {p: model.get_submodule(p).bias.detach() for p in W}
    A = {p: op.A.detach().clone().requires_grad_() for p, op in ops(model).items()}
    B = {p: op.B.detach().clone().requires_grad_() for p, op in ops(model).items()}
    for p, op in ops(model).items():
        if op.A0 is not None:
            W[p] -= s * op.B0 @ op.A0
    mine = OPTIMISERS[kind]([q for q in model.parameters() if q.requires_grad])
    theirs = OPTIMISERS[kind]([t for p in A for t in (A[p], B[p])])
    for t, (x, y) in enumerate(batches(steps)):
        out = model(x)
        h = x
        for p in ("0", "2"):
            h = h @ (W[p] + s * B[p] @ A[p]).T + b[p]
            h = torch.tanh(h) if p == "0" else h
        torch.testing.assert_close(out, h, rtol=1e-11, atol=1e-12)
        (out - y).square().mean().backward()
        mine.step()
        mine.zero_grad()
        (h - y).square().mean().backward()
        before = {p: (B[p] @ A[p]).detach() for p in A}
        theirs.step()
        theirs.zero_grad()
        if t >= start:
            W = {p: W[p] + ratio * s * ((B[p] @ A[p]).detach() - before[p]) for p in W}
    for p, op in ops(model).items():
        torch.testing.assert_close(op.A, A[p], rtol=1e-10, atol=1e-12)
        assert op.started
        assert (op.Ak is None) == (start == 0 and init == "kaiming")
    st.merge(model)
    for p in W:
        torch.testing.assert_close(model.get_submodule(p).weight, W[p] + s * B[p] @ A[p], rtol=1e-10, atol=1e-12)


def trained(steps: int, start: int = 2) -> nn.Module:
    model = net()
    st.attach(model, st.DeltaLoRA(r=3, ratio=0.7, start=start))
    go_on(model, steps)
    return model


def go_on(model: nn.Module, steps: int) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for x, y in batches(steps):
        (model(x) - y).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("steps", [1, 5])
def test_files_stay_low_rank_and_training_goes_on_from_them(steps: int, tmp_path: Any) -> None:
    model = trained(steps)
    base = {k: v.clone() for k, v in net().state_dict().items()}
    assert all(torch.equal(v, base[k]) for k, v in base_state_dict(model).items()), "the base was written"
    st.save(model, tmp_path)
    loaded = net()
    st.load(loaded, tmp_path, trainable=True)
    x = batches(1)[0][0]
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-13, atol=1e-13)
    assert all(op.started == (steps >= 2) for op in ops(loaded).values())
    go_on(model, 4)
    go_on(loaded, 4)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-13, atol=1e-13)
    assert all(op.started for op in ops(loaded).values())


def test_the_report_says_when_it_is_plain_lora_still() -> None:
    assert "plain LoRA so far (optimiser step 1)" in str(st.report(trained(1)))
    assert "plain LoRA" not in str(st.report(trained(3)))


def test_options_that_contradict_it() -> None:
    with pytest.raises(SpecError, match=r"(?s)ratio must be above 0.*dropout must be 0.*up_bias must be False"):
        st.attach(net(), st.DeltaLoRA(ratio=0.0, dropout=0.1, up_bias=True))


def test_it_learns() -> None:
    model = net()
    target = net()
    with torch.no_grad():
        target[2].weight += 0.5 * torch.randn(4, 6)
    st.attach(model, st.DeltaLoRA(r=2, start=20))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for x, _ in batches(150):
        loss = (model(x) - target(x).detach()).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10]), losses[::15]
