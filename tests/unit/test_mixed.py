"""Mixed batches of few tokens: the batched products give what each row gives alone, and notice every change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    """Tell whether the batched form is what runs: the first layer has a bank that finds the adapters of the plan."""
    bank, plan = net[0].slim.bank, net.slim_state.current()  # type: ignore[index, union-attr, operator]
    mixture = plan.mixture(plan.size, "", "")  # type: ignore[union-attr]
    return bank is not None and mixture is not None and bank.find(mixture) is not None


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
def test_other_methods_and_stacks_take_the_general_way() -> None:
    net = model(2)
    st.attach(net, st.BitFit(), name="bias")
    fill(net, "bias")
    rows: list[object] = ["a0", "bias", ["a1", "bias"], None]
    x = torch.randn(4, 8, dtype=torch.float64)
    with st.use(net, rows=rows):  # type: ignore[arg-type]
        got = net(x)
        assert not stacked(net)
    torch.testing.assert_close(got, alone(net, x, rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (5, 8)])
@torch.no_grad()
def test_ranks_targets_and_scales_may_differ(shape: tuple[int, ...]) -> None:
    net = model(2)
    st.attach(net, st.LoRA(r=5, alpha=3), name="wide")
    st.attach(net, st.LoRA(r=2, targets=["0"]), name="first")
    st.attach(net, st.LoRA(r=2, targets=["2"], alpha=9), name="last")
    st.attach(net, st.LoRA(r=3, alpha=7), name="other")
    for name in ("wide", "first", "last", "other"):
        fill(net, name)
    rows: list[object] = ["wide", "a0", None, "first", {"wide": 0.3}, "last", "a1", "other", {"a0": -2.0}]
    x = torch.randn(len(rows), *shape, dtype=torch.float64)
    with st.use(net, rows=rows):  # type: ignore[arg-type]
        got = net(x)
        assert stacked(net)
    torch.testing.assert_close(got, alone(net, x, rows), rtol=1e-12, atol=1e-12)


def parameters(net: nn.Module, name: str) -> list[nn.Parameter]:
    return list(net.slim_state.adapters[name].parameters())  # type: ignore[union-attr, operator]


def fill(net: nn.Module, name: str) -> None:
    with torch.no_grad():
        for p in parameters(net, name):
            p.normal_()


ROW_OF_EACH: list[object] = ["a0", "a1", "a2", "a0", None]


def served(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a server gives, and check it row by row."""
    with torch.no_grad():
        with st.use(net, rows=ROW_OF_EACH):  # type: ignore[arg-type]
            got = net(x)
            assert stacked(net)
        torch.testing.assert_close(got, alone(net, x, ROW_OF_EACH), rtol=1e-12, atol=1e-12)
    return got


def lives(net: nn.Module, name: str) -> bool:
    bank = net[0].slim.bank  # type: ignore[index, union-attr]
    return bank is not None and bank._places[name].room is not None  # type: ignore[union-attr]


def by_data(net: nn.Module) -> None:
    for p in parameters(net, "a1"):
        p.data.mul_(2)


def by_new_data(net: nn.Module) -> None:
    for p in parameters(net, "a1"):
        p.data = torch.randn_like(p)


def by_setattr(net: nn.Module) -> None:
    op = net[0].slim.ops("a1")[0]  # type: ignore[index, union-attr, operator]
    op.A = nn.Parameter(torch.randn_like(op.A))


def by_hand(net: nn.Module) -> None:
    op = net[0].slim.ops("a1")[0]  # type: ignore[index, union-attr, operator]
    op._parameters["B"] = nn.Parameter(torch.randn_like(op.B))


def by_scale(net: nn.Module) -> None:
    net[0].slim.ops("a1")[0].scale = 0.125  # type: ignore[index, union-attr, operator]


def by_state_dict(net: nn.Module) -> None:
    net.load_state_dict({k: torch.randn_like(v) if ".a1." in k else v for k, v in net.state_dict().items()})


def by_assigning(net: nn.Module) -> None:
    net.load_state_dict({k: torch.randn_like(v) if ".a1." in k else v for k, v in net.state_dict().items()}, assign=True)


def by_training(net: nn.Module) -> None:
    st.use(net, "a1")
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.randn(4, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def by_attaching_again(net: nn.Module) -> None:
    st.detach(net, "a1")
    st.attach(net, st.LoRA(r=3), name="a1")
    fill(net, "a1")


def by_another_rank(net: nn.Module) -> None:
    st.detach(net, "a1")
    st.attach(net, st.LoRA(r=7), name="a1")
    fill(net, "a1")


def by_rows_taken_off(net: nn.Module) -> None:
    op = net[0].slim.ops("a1")[0]  # type: ignore[index, union-attr, operator]
    op.A.data, op.B.data = op.A.data[:2], op.B.data[:, :2].contiguous()


@pytest.mark.parametrize(
    "change",
    [
        by_data, by_new_data, by_setattr, by_hand, by_scale, by_state_dict, by_assigning, by_training, by_attaching_again, by_another_rank,
        by_rows_taken_off,
    ],
)
def test_every_way_to_change_a_parameter_is_seen(change: Callable[[nn.Module], None]) -> None:
    net = model(4)
    x = torch.randn(5, 8, dtype=torch.float64)
    first = served(net, x)
    assert lives(net, "a1")
    change(net)
    second = served(net, x)
    assert not torch.allclose(first[1], second[1])
    torch.testing.assert_close(first[[0, 2, 3, 4]], second[[0, 2, 3, 4]])
    assert torch.equal(second, served(net, x))


def test_a_new_mixture_of_residents_moves_and_copies_nothing() -> None:
    net = model(9)
    x = torch.randn(5, 8, dtype=torch.float64)
    served(net, x)
    at = [p.data_ptr() for i in range(9) for p in parameters(net, f"a{i}")]
    with torch.no_grad(), st.use(net, rows=["a8", "a3", "a5", None, "a7"]):
        rows = net(x)
    assert at == [p.data_ptr() for i in range(9) for p in parameters(net, f"a{i}")]
    torch.testing.assert_close(rows, alone(net, x, ["a8", "a3", "a5", None, "a7"]), rtol=1e-12, atol=1e-12)
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with torch.no_grad(), watch as profile, st.use(net, rows=["a1", "a3", "a6", "a2", "a1"]):
        net(x)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::sparse_sampled_addmm" in ran
    assert not ran & {"aten::stack", "aten::cat", "aten::index_select", "aten::bmm"}


def test_parameters_in_a_bank_are_ordinary_tensors(tmp_path: Path) -> None:
    net = model(4)
    held = [parameters(net, f"a{i}") for i in range(4)]
    served(net, torch.randn(5, 8, dtype=torch.float64))
    for i in range(4):
        for before, p in zip(held[i], parameters(net, f"a{i}"), strict=True):
            assert p is before
            assert p.is_contiguous()
            assert p.storage_offset() == 0
            assert p.untyped_storage().nbytes() == p.numel() * 8
    assert len({p.untyped_storage()._cdata for ps in held for p in ps}) == 16
    torch.save(held[0][0], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000
    save_file({k: v for k, v in net.state_dict().items()}, tmp_path / "all.safetensors")
    assert len(load_file(tmp_path / "all.safetensors")) == len(net.state_dict())
    copied, again = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = served(net, x)
    for p in held[1]:
        p.data.mul_(3)
    for other in (copied, again):
        torch.testing.assert_close(served(other, x), expected)


def test_memory_that_others_refer_to_stays_where_it_is() -> None:
    """A flat buffer, as sharded optimizers keep it, and a state dict in somebody's hands: writing into them writes the adapter."""
    net = model(4)
    flat = torch.randn(sum(p.numel() for p in parameters(net, "a0")), dtype=torch.float64)
    for p, part in zip(parameters(net, "a0"), flat.split([p.numel() for p in parameters(net, "a0")]), strict=True):
        p.data = part.view_as(p)
    kept = net.state_dict()
    x = torch.randn(5, 8, dtype=torch.float64)
    first = served(net, x)
    assert not lives(net, "a0")
    assert not lives(net, "a1")
    for key, value in kept.items():
        if ".a1." in key:
            value.mul_(2)
    flat.mul_(2)
    second = served(net, x)
    assert not torch.allclose(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    del kept
    assert torch.equal(served(net, x), second) or lives(net, "a1")
    served(net, x)
    assert lives(net, "a1")
    assert not lives(net, "a0")


def test_a_place_is_given_on_only_when_nothing_refers_to_it() -> None:
    net = model(4)
    x = torch.randn(5, 8, dtype=torch.float64)
    served(net, x)
    kept = {k: v for k, v in net.state_dict().items() if ".a1." in k}
    values = {k: v.clone() for k, v in kept.items()}
    for i in range(40):  # more than a room has places, so that some are given on and a larger room is built
        st.detach(net, "a1")
        st.attach(net, st.LoRA(r=3), name="a1")
        fill(net, "a1")
        if i > 30:
            st.attach(net, st.LoRA(r=3), name=f"more{i}")
        served(net, x)
    assert all(torch.equal(kept[k], values[k]) for k in kept)
    assert len(net[0].slim.bank._places["a1"].room.A) <= 32  # type: ignore[index, union-attr, operator]


def test_an_infinite_row_leaves_later_batches_alone() -> None:
    net = model(3)
    x = torch.randn(3, 8, dtype=torch.float64)
    bad = x.clone()
    bad[1] = float("inf")
    st.use(net, rows=["a0", "a1", "a2"])  # one plan, whose samples are kept
    with torch.no_grad():
        good = net(x)
        net(bad)
        assert torch.equal(net(x), good)


def test_a_move_to_another_type_is_followed() -> None:
    net = model(4)
    x = torch.randn(5, 8, dtype=torch.float64)
    served(net, x)
    net.to(torch.float32)
    with torch.no_grad(), st.use(net, rows=ROW_OF_EACH):  # type: ignore[arg-type]
        got = net(x.float())
    torch.testing.assert_close(got, alone(net, x.float(), ROW_OF_EACH).detach(), rtol=1e-4, atol=1e-4)
    served(net.to(torch.float64), x)


def test_one_parameter_at_two_sites_is_right_at_both() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    for i in range(3):
        st.attach(net, st.LoRA(r=3), name=f"a{i}")
        fill(net, f"a{i}")
    net[2].slim.ops("a1")[0].A = net[0].slim.ops("a1")[0].A  # type: ignore[union-attr, operator]
    net.eval()
    for _ in range(3):
        served(net, torch.randn(5, 8, dtype=torch.float64))


def test_threads_share_a_plan_and_a_bank() -> None:
    net = model(4)
    xs = [torch.randn(5, 8, dtype=torch.float64) for _ in range(8)]
    st.use(net, rows=ROW_OF_EACH)  # type: ignore[arg-type]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:

        def run(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return net(x)  # type: ignore[no-any-return]

        got = list(pool.map(run, xs * 10))
    with torch.no_grad():
        for x, y in zip(xs * 10, got, strict=True):
            torch.testing.assert_close(y, net(x), rtol=1e-12, atol=1e-12)


def test_inference_mode_and_functional_calls_are_right() -> None:
    net = model(4)
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.inference_mode(), st.use(net, rows=ROW_OF_EACH):  # type: ignore[arg-type]
        first = net(x)
    torch.testing.assert_close(first.clone(), served(net, x))
    other = {k: torch.randn_like(v) for k, v in net.named_parameters() if ".slim." in k}
    with torch.no_grad(), st.use(net, rows=ROW_OF_EACH):  # type: ignore[arg-type]
        swapped = torch.func.functional_call(net, other, (x,))
    changed = copy.deepcopy(net)
    changed.load_state_dict(other, strict=False)
    torch.testing.assert_close(swapped, served(changed, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(served(net, x), first.clone())


def test_compiled_models_serve_mixtures() -> None:
    net = model(4)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = served(net, x)
    with torch.no_grad(), st.use(net, rows=ROW_OF_EACH):  # type: ignore[arg-type]
        got = torch.compile(net, backend="eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


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
