"""Mixed batches of few tokens: the batched products give what each row gives alone, and notice every change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import slimtune as st


def model(adapters: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)).to(dtype)
    for i in range(adapters):
        st.attach(net, st.LoRA(r=3, dropout=0.5), name=f"a{i}")
        with torch.no_grad():
            for p in net.slim_state.adapters[f"a{i}"].parameters():  # type: ignore[union-attr, operator]
                p.normal_()
    return net.eval()


def alone(net: nn.Module, x: torch.Tensor, rows: list[object]) -> torch.Tensor:
    out = []
    for i, which in enumerate(rows):
        with st.use(net, which):  # type: ignore[arg-type]
            out.append(net(x[i : i + 1]))
    return torch.cat(out)


def stacked(net: nn.Module) -> bool:
    kept = net[0].slim.mixed  # type: ignore[index, union-attr]
    return kept is not None and kept[1] is not None


ROWS: list[list[object]] = [
    ["a0", "a1", "a2", "a3"],
    ["a2", None, "a0", "a2", "a1", "a2"],
    ["a0", "a0", None, {"a1": 0.3}, "a3", "a0", {"a1": 0.3}],
    ["a0", "a0", "a2", "a2", "a1", "a1"],  # blocks
    ["a0", "a1", "a2", "a0", "a1", "a2"],  # turns
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(8,), (5, 8)])
@torch.no_grad()
def test_equals_each_row_alone(rows: list[object], shape: tuple[int, ...]) -> None:
    net = model(4)
    x = torch.randn(len(rows), *shape, dtype=torch.float64)
    with st.use(net, rows=rows):  # type: ignore[arg-type]
        got = net(x)
        assert stacked(net), "the batched form was meant to run"
    torch.testing.assert_close(got, alone(net, x, rows), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_notices_changed_parameters_adapters_and_modes() -> None:
    net = model(4)
    rows: list[object] = ["a0", "a1", "a2", "a0"]
    x = torch.randn(4, 8, dtype=torch.float64)
    use = st.use(net, rows=rows)  # type: ignore[arg-type]
    first = net(x)
    for p in net.slim_state.adapters["a1"].parameters():  # type: ignore[union-attr, operator]
        p.mul_(2)
    second = net(x)
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(second, alone(net, x, rows), rtol=1e-12, atol=1e-12)
    net.train()
    assert not torch.equal(net(x), net(x)), "dropout acts in training mode"
    net.eval()
    copied = copy.deepcopy(net)
    st.detach(net, "a3")
    torch.testing.assert_close(net(x), second)
    torch.testing.assert_close(copied(x), second)
    del use


def test_with_gradients_every_adapter_gets_its_own() -> None:
    net = model(4)
    st.trainable(net, ["a0", "a1", "a2"])
    x = torch.randn(4, 8, dtype=torch.float64)
    with st.use(net, rows=["a0", "a1", "a2", "a0"]):
        net(x).sum().backward()
    for name in ("a0", "a1", "a2"):
        for p in net.slim_state.adapters[name].parameters():  # type: ignore[union-attr, operator]
            assert p.grad is not None
            assert p.grad.abs().sum() > 0


@torch.no_grad()
def test_mixed_ranks_and_methods_take_the_general_way() -> None:
    net = model(2)
    st.attach(net, st.LoRA(r=2), name="other")
    st.attach(net, st.BitFit(), name="bias")
    with torch.no_grad():
        for name in ("other", "bias"):
            for p in net.slim_state.adapters[name].parameters():  # type: ignore[union-attr, operator]
                p.normal_()
    rows: list[object] = ["a0", "other", "bias", ["a1", "bias"]]
    x = torch.randn(4, 8, dtype=torch.float64)
    with st.use(net, rows=rows):  # type: ignore[arg-type]
        got = net(x)
        assert not stacked(net)
    torch.testing.assert_close(got, alone(net, x, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [["a0", "a0", "a2", "a2", "a1", "a1"], ["a0", "a1", "a2", "a0", "a1", "a2"], ["a2", None, "a0", "a2", "a1", "a2"]])
@pytest.mark.parametrize("shape", [(8,), (5, 8)])
@torch.no_grad()
def test_half_precision_rows_are_as_exact_as_their_type(rows: list[object], shape: tuple[int, ...]) -> None:
    net = model(3)
    x = torch.randn(len(rows), *shape, dtype=torch.float64)
    with st.use(net, rows=rows):  # type: ignore[arg-type]
        exact = net[0](x)
    half = copy.deepcopy(net).to(torch.bfloat16)
    with st.use(half, rows=rows):  # type: ignore[arg-type]
        got = half[0](x.to(torch.bfloat16))
        assert stacked(half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())


@torch.no_grad()
def test_one_adapter_without_gradients_follows_every_change() -> None:
    """What a site keeps for the plan seen last is let go of when the plan, the adapter or its parameters change."""
    net = model(2)
    x = torch.randn(1, 8, dtype=torch.float64)

    def by_hand(name: str) -> torch.Tensor:
        y = x
        for layer in net:
            ops = layer.slim.ops(name) if isinstance(layer, nn.Linear) else []  # type: ignore[union-attr, operator]
            y = (y @ (layer.weight + ops[0].delta()).T + (0 if layer.bias is None else layer.bias)) if ops else layer(y)
        return y

    for name in ("a0", "a1", "a0"):
        st.use(net, name)
        torch.testing.assert_close(net(x), by_hand(name), rtol=1e-12, atol=1e-12)
    for p in net.slim_state.adapters["a0"].parameters():  # type: ignore[union-attr, operator]
        p.mul_(3.0)
    torch.testing.assert_close(net(x), by_hand("a0"), rtol=1e-12, atol=1e-12)
    st.detach(net, "a0")
    st.attach(net, st.LoRA(r=2), name="a0")
    for p in net.slim_state.adapters["a0"].parameters():  # type: ignore[union-attr, operator]
        p.normal_()
    st.use(net, "a0")
    torch.testing.assert_close(net(x), by_hand("a0"), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_masters_narrower_than_the_data_do_not_narrow_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96, bias=False)).double()
    st.attach(net, st.LoRA(r=4))
    op = net[0].slim.ops("default")[0]  # type: ignore[union-attr, operator]
    op.B.normal_()
    op.to(torch.bfloat16)
    x = torch.randn(1, 64, dtype=torch.float64)
    exact = x @ net[0].weight.T + op.scale * (x @ op.A.double().T) @ op.B.double().T  # type: ignore[operator]
    torch.testing.assert_close(net.eval()(x), exact, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_few_half_precision_tokens_run_in_the_type_of_the_masters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96, bias=False)).to(torch.bfloat16)
    st.attach(net, st.LoRA(r=4))
    op = net[0].slim.ops("default")[0]  # type: ignore[union-attr, operator]
    op.B.normal_()
    x = torch.randn(1, 3, 64).to(torch.bfloat16)
    exact = x.double() @ (net[0].weight.double() + op.delta().double()).T  # type: ignore[operator]
    got = net.eval()(x)
    assert op.A.dtype == torch.float32
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
