"""Progressive rank: growing changes no output and no moment, shrinking is the truncated SVD, by schedule, by the loss, and by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import SlimtuneError, SpecError
from slimtune.core.state import state_of
from slimtune.methods.progressive import grow, shrink


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()


def ops(model: nn.Module) -> list[Any]:
    return list(state_of(model).adapters["default"].ops.values())


def batch(i: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(i)
    return torch.randn(16, 12, generator=draw, dtype=torch.float64), torch.randn(16, 8, generator=draw, dtype=torch.float64)


def go(model: nn.Module, optimiser: Any, first: int, last: int) -> None:
    for i in range(first, last):
        x, y = batch(i)
        loss = (model(x) - y).square().mean()  # alive across the step, as in most loops
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)


def attached(**options: Any) -> nn.Module:
    model = net()
    torch.manual_seed(5)
    st.attach(model, st.ProgressiveLoRA(**{"r": 2, "by": 2, "max_r": 6, "every": 0, **options}))
    return model


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_growing_changes_neither_output_nor_moments(options: dict[str, Any]) -> None:
    model = attached()
    optimiser = adam(model, **options)
    go(model, optimiser, 0, 5)
    x, _ = batch(99)
    out = model(x)
    params = [p for p in model.parameters() if p.requires_grad]
    old = {p: {k: v.clone() for k, v in optimiser.state[p].items()} for p in params}
    values = [(op.A.detach().clone(), op.B.detach().clone(), op.scale) for op in ops(model)]
    grow(model, by=3)
    torch.testing.assert_close(model(x), out, rtol=1e-13, atol=1e-13)  # products of more columns may be summed in another order
    assert params == [p for p in model.parameters() if p.requires_grad], "another parameter object"
    for op, (A, B, scale) in zip(ops(model), values, strict=True):
        assert (op.r, op.scale) == (5, scale)
        assert torch.equal(op.A[:2], A)
        assert torch.equal(op.B[:, :2], B)
        assert not op.B[:, 2:].any()
        assert (op.A[2:].abs() > 0).all()
    again = copy.deepcopy(model)
    (model(x) ** 2).mean().backward()
    norms = [p.grad.clone() for p in params]
    optimiser.step()
    for p, g in zip(params, norms, strict=True):
        axis = next(d for d in range(2) if old[p]["exp_avg"].shape[d] != p.shape[d])
        want = old[p]["exp_avg"] * 0.9 + 0.1 * g.narrow(axis, 0, 2)
        torch.testing.assert_close(optimiser.state[p]["exp_avg"].narrow(axis, 0, 2), want)
        torch.testing.assert_close(optimiser.state[p]["exp_avg"].narrow(axis, 2, 3), 0.1 * g.narrow(axis, 2, 3))
        assert optimiser.state[p]["step"] == old[p]["step"] + 1
    assert not torch.equal(again(x), model(x))
    go(model, optimiser, 5, 8)


def test_old_directions_train_as_if_nothing_had_happened_until_the_new_ones_move() -> None:
    grown, plain = attached(), attached()
    a, b = adam(grown), adam(plain)
    go(grown, a, 0, 4)
    go(plain, b, 0, 4)
    grow(grown, by=2)
    go(grown, a, 4, 5)
    go(plain, b, 4, 5)
    for op, other in zip(ops(grown), ops(plain), strict=True):
        torch.testing.assert_close(op.A[:2], other.A, rtol=1e-12, atol=0)
        torch.testing.assert_close(op.B[:, :2], other.B, rtol=1e-12, atol=0)


def test_the_schedule() -> None:
    model = attached(every=3)
    optimiser = adam(model)
    seen = []
    for i in range(12):
        go(model, optimiser, i, i + 1)
        seen.append(ops(model)[0].r)
    assert seen == [2, 2, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6]
    assert all(optimiser.state[p]["exp_avg"].shape == p.shape for p in optimiser.param_groups[0]["params"])
    twin = attached(every=3)
    go(twin, adam(twin), 0, 12)
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(ops(model), ops(twin), strict=True)), "new directions from a seed"


@pytest.mark.parametrize("how", [{"r": 2}, {"energy": 0.9}])
def test_shrinking_is_the_truncated_svd(how: dict[str, Any]) -> None:
    model = attached(r=6)
    optimiser = adam(model)
    go(model, optimiser, 0, 30)
    deltas = [op.delta().detach() for op in ops(model)]
    errors = shrink(model, **how)
    for op, D, error in zip(ops(model), deltas, errors.values(), strict=True):
        S = torch.linalg.svdvals(D)
        if "r" in how:
            assert op.r == 2
        else:
            assert (S[: op.r] ** 2).sum() >= 0.9 * (S**2).sum() > (S[: op.r - 1] ** 2).sum()
        want = float((S[op.r :] ** 2).sum().sqrt() / S.norm())
        assert error == pytest.approx(want, rel=1e-6)
        torch.testing.assert_close((op.delta() - D).norm() / D.norm(), torch.tensor(want).double(), rtol=1e-6, atol=1e-12)
    assert any(op.r < 6 for op in ops(model))
    assert "shrunk by SVD" in str(st.report(model))
    go(model, optimiser, 30, 33)  # moments of directions that are no more are forgotten
    assert all(float(optimiser.state[op.A]["step"]) == (3 if op.r < 6 else 33) for op in ops(model))


def test_shrinking_by_schedule_then_growing_on() -> None:
    model = attached(r=6, max_r=8, shrink_at=5, energy=0.6)
    go(model, adam(model), 0, 8)
    assert all(0 < op.r < 6 and op.lost > 0 for op in ops(model))


def test_an_optimiser_whose_state_has_other_shapes_begins_anew() -> None:
    model = attached()
    optimiser = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    go(model, optimiser, 0, 3)
    grow(model, by=2)
    with pytest.warns(UserWarning, match="begins anew"):
        go(model, optimiser, 3, 5)
    assert all(p.isfinite().all() for p in model.parameters())


def test_every_kind_of_module_grows_and_shrinks() -> None:
    torch.manual_seed(0)
    cases = [
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), torch.randn(2, 4, 6, 6).double()),
        (nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(2, 4, 7).double()),
        (nn.Sequential(nn.Embedding(9, 6, padding_idx=0)), torch.randint(0, 9, (3, 5))),
    ]
    for model, x in cases:
        model = model.double()
        st.attach(model, st.ProgressiveLoRA(r=2, every=0, targets=("0",)))
        optimiser = adam(model)

        def step(model: nn.Module = model, x: Tensor = x, optimiser: Any = optimiser) -> None:
            model(x).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()

        step()
        step()
        out = model(x)
        grow(model, by=2)
        torch.testing.assert_close(model(x), out, rtol=1e-12, atol=1e-12)
        m = {p: optimiser.state[p]["exp_avg"].clone() for p in optimiser.param_groups[0]["params"]}
        step()
        (op,) = ops(model)
        assert op.r == 4
        if op.groups == 2:  # the old directions of each group stay with it
            old, new = m[op.A].view(2, 1, 2, 3, 3), optimiser.state[op.A]["exp_avg"].view(2, 2, 2, 3, 3)
            assert ((new[:, :1] - 0.9 * old).abs() > 0).any()
        step()
        D = op.delta().detach()
        (error,) = shrink(model, r=2).values()
        assert op.r == 2
        torch.testing.assert_close(float((op.delta() - D).norm() / D.norm()), error)
        if isinstance(model[0], nn.Embedding):
            assert not op.delta()[0].any(), "the row of padding_idx moved"
        step()


def test_files_keep_the_rank(tmp_path: Any) -> None:
    model = attached(every=2)
    go(model, adam(model), 0, 5)
    st.save(model, tmp_path)
    loaded = net()
    st.load(loaded, tmp_path, trainable=True)
    x, _ = batch(50)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-13, atol=1e-13)
    assert st.report(loaded).ranks() == {"0": 6, "2": 6}
    assert [op.scale for op in ops(loaded)] == [op.scale for op in ops(model)]
    assert state_of(loaded).adapters["default"].steps == 5
    go(loaded, adam(loaded), 5, 7)


def test_a_trainer_grows_when_its_loss_stalls(tmp_path: Any) -> None:
    import transformers

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.lin(x) - labels).square().mean()}

    torch.manual_seed(0)
    model = Net()
    st.attach(model, st.ProgressiveLoRA(r=1, by=1, max_r=4, every=0, patience=3, targets=("lin",)))
    draw = torch.randn(6, 6)
    x = torch.randn(8, 6)
    rows = [{"x": v, "labels": w} for v, w in zip(x, x @ draw.T, strict=True)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=60, report_to="none", use_cpu=True, save_strategy="no",
        logging_steps=1, learning_rate=0.2, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    (op,) = ops(model)
    assert op.r > 1
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert min(losses[-20:]) < 0.5 * losses[0]


def test_ranks_as_a_picture(tmp_path: Any) -> None:
    from slimtune.train.figures import draw_ranks, rank_table

    ranks = {"model.layers.0.q": 4, "model.layers.1.q": 2, "model.layers.1.mlp.up": 7, "head": 1}
    assert rank_table(ranks) == (["q", "mlp.up", "head"], [0, 1], [[4, 2], [None, 7], [1, None]])
    assert draw_ranks(ranks, tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    model = attached()
    assert st.report(model).ranks() == {"0": 2, "2": 2}
    with pytest.raises(SpecError, match="no ranks"):
        draw_ranks({}, tmp_path / "none.png")


def test_what_cannot_be() -> None:
    model = attached(patience=2)
    with pytest.raises(SpecError, match="patience= reads the loss"):
        go(model, adam(model), 0, 1)
    with pytest.raises(SpecError, match=r"(?s)max_r must not be below r.*init must be one of"):
        st.attach(net(), st.ProgressiveLoRA(r=8, max_r=4, init="pissa"))
    with pytest.raises(SpecError, match="by must be"):
        grow(model, by=0)
    with pytest.raises(SpecError, match="r= or energy="):
        shrink(model)
    other = net()
    st.attach(other, st.LoRA())
    with pytest.raises(SlimtuneError, match="fixed rank"):
        grow(other, by=1)
