"""Adapters of different methods on one model, stacked and summed, and unions of methods under one name: against results worked out by hand."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import CapabilityError, MismatchError, SpecError, TargetError
from slimtune.core.plan import Which
from slimtune.core.spec import Spec
from slimtune.testing.subject import adapter_of, fill


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))  # type: ignore[no-any-return]


SPECS: dict[str, st.Spec] = {
    "lora": st.LoRA(r=3, alpha=5, targets="fc2"),
    "ia3": st.IA3(targets="fc2"),  # changes the input of fc2
    "gain": st.IA3(targets="fc2", feedforward=()),  # scales the output of fc2
    "bitfit": st.BitFit(targets="fc2"),
    "pfeiffer": st.Bottleneck(reduction=2),
    "parallel": st.Parallel(reduction=2),
    "gated": st.Gated(of=st.LoRA(r=2, targets="fc2")),
    "dora": st.DoRA(of=st.LoRA(r=2, targets="fc2")),
}


def build(specs: dict[str, st.Spec]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward()).double()
    for i, (name, spec) in enumerate(specs.items()):
        torch.manual_seed(i)
        st.attach(model, spec, name=name)
        fill(model, name, 0.4)
    return model, torch.randn(5, 3, 6, dtype=torch.float64)


def step(op: Any, method: str, W: Tensor, b: Tensor, x: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """Return what one op makes of y, written from its formula. h is what fc2 is given, x what fc1 is."""
    if method == "lora":
        return y + 5 / 3 * h @ op.A.T @ op.B.T
    if method == "gain":
        return y * op.l
    if method == "bitfit":
        return y + op.d
    if method == "pfeiffer":
        return y + torch.relu(y @ op.down_w.T + op.down_b) @ op.up_w.T + op.up_b
    if method == "parallel":
        return y + 4 * (torch.relu(x @ op.down_w.T + op.down_b) @ op.up_w.T + op.up_b)
    if method == "gated":
        return y + torch.sigmoid(h @ op.gate_v + op.gate_c)[..., None] * (2 * h @ op.inner.A.T @ op.inner.B.T)
    raise AssertionError(method)


def parts_of(model: nn.Module, x: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
    layer: Any = model.get_submodule("0")
    with st.disabled(model):
        h = torch.tanh(layer.fc1(x))
    return layer, layer.fc2.weight.detach(), layer.fc2.bias.detach(), h


def op_of(model: nn.Module, name: str, i: int = 0) -> Any:
    return list(adapter_of(model, name).ops.values())[i]


def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return x @ W.T + b


ADDING = ["lora", "gain", "bitfit", "pfeiffer", "parallel", "gated"]


@pytest.mark.parametrize("first", ADDING)
@pytest.mark.parametrize("second", ADDING)
def test_a_stack_acts_one_after_the_other(first: str, second: str) -> None:
    if first == second:
        second = "ia3"
    model, x = build({n: SPECS[n] for n in (first, second)})
    _, W, b, h = parts_of(model, x)
    with torch.no_grad():
        if second == "ia3":  # it changes what the adapter before it sees, which is the inner one of the two
            h = h * op_of(model, "ia3").l
            want = step(op_of(model, first), first, W, b, x, h, linear(h, W, b))
        else:
            want = step(op_of(model, first), first, W, b, x, h, linear(h, W, b))
            want = step(op_of(model, second), second, W, b, x, h, want)
        with st.use(model, [first, second]):
            torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("inner", ADDING)
def test_a_changed_input_concerns_what_stands_before_it(inner: str) -> None:
    model, x = build({n: SPECS[n] for n in ("ia3", inner)})
    _, W, b, h = parts_of(model, x)
    with torch.no_grad(), st.use(model, ["ia3", inner]):
        y = linear(h * op_of(model, "ia3").l, W, b)
        torch.testing.assert_close(model(x), step(op_of(model, inner), inner, W, b, x, h, y))


def test_a_weighted_sum_of_every_method() -> None:
    model, x = build({n: SPECS[n] for n in [*ADDING, "ia3"]})
    _, W, b, h = parts_of(model, x)
    weights = dict(zip(ADDING, (0.7, -0.4, 0.3, 1.5, 0.5, -0.8), strict=True))
    with torch.no_grad():
        y = linear(h, W, b)
        want = y + sum(w * (step(op_of(model, n), n, W, b, x, h, y) - y) for n, w in weights.items())
        with st.use(model, weights):
            torch.testing.assert_close(model(x), want)
        entered = h + 0.25 * (h * op_of(model, "ia3").l - h)
        y = linear(entered, W, b)
        lora, par = (step(op_of(model, n), n, W, b, x, h, y) - y for n in ("lora", "parallel"))
        with st.use(model, {"lora": 0.7, "ia3": 0.25, "parallel": -1.0}):
            torch.testing.assert_close(model(x), y + 0.7 * lora - par)


def test_rows_of_different_methods() -> None:
    model, x = build(SPECS)
    plan: list[Which] = ["lora", {"ia3": 0.5, "pfeiffer": 2.0}, None, ["parallel", "dora"], ["dora", "gated"]]
    with torch.no_grad():
        with st.use(model, rows=plan):
            mixed = model(x)
        for i, which in enumerate(plan):
            with st.use(model, which):
                torch.testing.assert_close(mixed[i : i + 1], model(x[i : i + 1]))


def test_a_stack_and_a_sum_of_different_methods_merge() -> None:
    model, x = build({n: SPECS[n] for n in ("lora", "ia3", "gain", "bitfit", "dora")})
    for which in (["lora", "ia3", "gain"], ["gain", "bitfit", "dora"], {"lora": 0.7, "ia3": 0.3, "bitfit": -1.0}, {"gain": 0.5, "lora": 1.0}):
        with torch.no_grad(), st.use(model, which):
            want = model(x)
        st.merge(model, which)
        torch.testing.assert_close(model(x), want)
        st.unmerge(model)


def test_what_replaces_the_output_cannot_be_summed_with_others() -> None:
    model, x = build({n: SPECS[n] for n in ("dora", "lora")})
    with pytest.raises(CapabilityError, match="weighted sum"), st.use(model, {"dora": 0.5, "lora": 0.5}):
        model(x)


# ---- unions -----------------------------------------------------------------------------------------------------------
def united(*names: str) -> tuple[nn.Module, Tensor]:
    """Return a model with the union "u" of some specs, and each as an adapter of its own with the same values."""
    model, x = build({**{n: SPECS[n] for n in names}, "u": st.Union(of=tuple(SPECS[n] for n in names))})
    with torch.no_grad():
        for i, name in enumerate(names):
            mine = [op for op in adapter_of(model, "u").ops.values() if op.part == i]
            for op, single in zip(mine, adapter_of(model, name).ops.values(), strict=True):
                op.load_state_dict(single.state_dict())
    return model, x


UNIONS = [("lora", "pfeiffer"), ("parallel", "lora", "gain"), ("ia3", "lora"), ("lora", "ia3"), ("gain", "dora"), ("gated", "pfeiffer")]


@pytest.mark.parametrize("names", UNIONS)
def test_a_union_is_the_stack_of_its_members(names: tuple[str, ...]) -> None:
    model, x = united(*names)
    with torch.no_grad():
        with st.use(model, list(names)):
            want = model(x)
        st.use(model, "u")
        torch.testing.assert_close(model(x), want)
        with st.disabled(model):
            base = model(x)
        with st.use(model, rows=["u", None, list(names), "u", None]):
            mixed = model(x)
        torch.testing.assert_close(mixed, torch.stack([want[0], base[1], want[2], want[3], base[4]]))


@pytest.mark.parametrize("names", [("lora", "pfeiffer"), ("parallel", "gain", "lora"), ("gain", "bitfit"), ("pfeiffer", "gated")])
def test_a_weighted_union_weighs_its_whole_change(names: tuple[str, ...]) -> None:
    model, x = united(*names)
    with torch.no_grad():
        with st.use(model, "u"):
            full = model(x)
        with st.use(model, None):
            base = model(x)
        for w in (1.0, 0.3, -2.0):
            with st.use(model, {"u": w}):
                torch.testing.assert_close(model(x), base + w * (full - base))
        with st.use(model, names[0]):
            other = model(x)
        with st.use(model, {"u": 0.5, names[0]: 0.25}):
            torch.testing.assert_close(model(x), base + 0.5 * (full - base) + 0.25 * (other - base))


def test_each_member_of_a_sum_finds_the_output_as_its_own_adapter_makes_it() -> None:
    """IA3 changes the input of fc2 and the Pfeiffer adapter reads its output: in one sum neither acts on the other."""
    model, x = build({n: SPECS[n] for n in ("ia3", "pfeiffer", "lora", "parallel")})
    _, W, b, h = parts_of(model, x)
    with torch.no_grad():
        y = linear(h, W, b)
        ia3 = linear(h * op_of(model, "ia3").l, W, b) - y
        others = {n: step(op_of(model, n), n, W, b, x, h, y) - y for n in ("pfeiffer", "lora", "parallel")}
        want = y + 0.5 * ia3 + 0.7 * others["pfeiffer"] - 0.3 * others["lora"] + 2 * others["parallel"]
        plan: Which = {"ia3": 0.5, "pfeiffer": 0.7, "lora": -0.3, "parallel": 2.0}
        with st.use(model, plan):
            torch.testing.assert_close(model(x), want)
        with st.use(model, rows=["ia3", plan, None, plan, "pfeiffer"]):
            mixed = model(x)
        torch.testing.assert_close(mixed[[1, 3]], want[[1, 3]])
        torch.testing.assert_close(mixed[0], (y + ia3)[0])
        after = y + 0.7 * others["lora"]  # a stack below a sum: the sum changes what the stack makes
        changed, low = h * op_of(model, "ia3").l, op_of(model, "lora")
        below = linear(changed, W, b) + 0.7 * 5 / 3 * changed @ low.A.T @ low.B.T
        bott = step(op_of(model, "pfeiffer"), "pfeiffer", W, b, x, h, after) - after
        with st.use(model, [{"lora": 0.7}, {"ia3": 0.5, "pfeiffer": 0.5}]):
            torch.testing.assert_close(model(x), after + 0.5 * (below - after) + 0.5 * bott)


def test_a_weighted_union_with_a_changed_input_merges_to_the_same() -> None:
    model, x = united("lora", "ia3", "gain")
    for which in ({"u": 1.0}, {"u": 0.4}, {"u": 0.4, "lora": -1.0}, ["u", "gain"]):
        with torch.no_grad(), st.use(model, which):
            want = model(x)
        st.merge(model, which)
        torch.testing.assert_close(model(x), want)
        st.unmerge(model)
    with torch.no_grad(), st.use(model, "u"):
        full = model(x)
    with torch.no_grad(), st.use(model, {"u": 1.0}):
        torch.testing.assert_close(model(x), full)


def test_the_error_says_which_member_does_not_merge() -> None:
    model, _ = united("lora", "pfeiffer")
    with pytest.raises(CapabilityError, match="BottleneckOp") as caught:
        st.merge(model, "u")
    assert "method bottleneck" in caught.value.where


def test_members_keep_their_places_and_options() -> None:
    from slimtune.testing import zoo

    model = zoo.bert()
    members = (st.LoRA(r=4, targets=("query", "value")), st.LoRA(r=2, targets="query"), st.Parallel(layers="last:1"))
    spec = st.Union(of=members, layers="last:1", train_modules=())
    report = st.attach(model, spec)
    found = [(row.path.removeprefix("bert.encoder.layer."), row.trainable) for row in report.rows]
    assert found == [
        ("1.attention.self.query", 4 * 64), ("1.attention.self.value", 4 * 64), ("1.attention.self.query", 2 * 64),
        ("1.output.dense", 2 * 2 * 32 + 2 + 32),
    ]  # fmt: skip
    assert report.method == "union"


def test_a_union_of_unions_and_a_head_that_several_name(tmp_path: Path) -> None:
    inner = st.Union(of=(st.LoRA(train_modules="1"), st.IA3(targets="fc2", feedforward=())), train_modules="1")
    spec = st.Union(of=(inner, st.DoRA(of=st.LoRA(r=2, targets="fc1", train_modules="1"))))
    assert [part.method for part in spec.parts()] == ["lora", "dense", "ia3", "dora"]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(), nn.Linear(6, 2)).double()
    st.attach(model, spec, name="u")
    fill(model, "u", 0.3)
    x = torch.randn(4, 6, dtype=torch.float64)
    want = model(x)
    assert [op.method for op in adapter_of(model, "u").ops.values()].count("dense") == 1
    st.save(model, tmp_path / "u", name="u")
    torch.manual_seed(0)
    other = nn.Sequential(FeedForward(), nn.Linear(6, 2)).double()
    st.load(other, tmp_path / "u")
    torch.testing.assert_close(other(x), want)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), want)
    st.merge(model, "u")
    torch.testing.assert_close(model(x), want)


def test_a_modifier_takes_over_what_its_method_trains_in_full() -> None:
    assert [p.method for p in st.DoRA(of=st.LoRA(train_modules="head")).parts()] == ["dora", "dense"]
    spec = st.DoRA(of=st.LoRA(train_modules="head", targets="q", layers="0"), train_modules="1", targets="fc2")
    assert spec.parts()[1].targets == "1"
    assert (spec.inner().targets, spec.inner().layers) == ("fc2", "0")
    model = nn.Sequential(FeedForward(), nn.Linear(6, 2))
    report = st.attach(model, st.Gated(of=st.LoRA(r=2, targets="fc1", train_modules=("1",))))
    assert [(row.path, row.trainable) for row in report.rows] == [("0.fc1", 2 * 16 + 7), ("1", 14)]
    assert {p.method for p in adapter_of(model, "default").ops.values()} == {"gated", "dense"}


def test_roles_of_a_modified_method_reach_the_optimiser() -> None:
    model, _ = build({"g": SPECS["gated"]})
    rates = {id(p): g["lr"] for g in st.param_groups(model, lr=1.0, up_ratio=16) for p in g["params"]}
    op = op_of(model, "g")
    assert [rates[id(p)] for p in (op.inner.A, op.inner.B, op.gate_v, op.gate_c)] == [1.0, 16.0, 1.0, 1.0]


def test_only_the_union_trains() -> None:
    model, x = united("lora", "pfeiffer", "ia3")
    st.use(model, "u")
    model(x).square().sum().backward()
    mine = {id(p) for p in adapter_of(model, "u").parameters()}
    assert len(mine) == 2 + 4 + 1
    for p in model.parameters():
        assert (p.grad is not None) == (id(p) in mine)


# ---- gates ------------------------------------------------------------------------------------------------------------
def test_a_gate_is_a_half_at_the_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward()).double()
    st.attach(model, SPECS["lora"], name="plain")
    st.attach(model, st.Gated(of=SPECS["lora"]), name="gated")
    op, plain = op_of(model, "gated"), op_of(model, "plain")
    with torch.no_grad():
        plain.B.normal_()
        op.inner.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, dtype=torch.float64)
    with st.use(model, {"plain": 0.5}):
        want = model(x)
    torch.testing.assert_close(model(x), want) if st.use(model, "gated") else None


def test_a_gated_input() -> None:
    model, x = build({"g": st.Gated(of=SPECS["ia3"])})
    _, W, b, h = parts_of(model, x)
    op = op_of(model, "g")
    g = torch.sigmoid(h @ op.gate_v + op.gate_c)[..., None]
    torch.testing.assert_close(model(x), linear(h + g * (h * op.inner.l - h), W, b))


def test_a_gate_sees_only_its_own_token() -> None:
    model, x = build({"g": SPECS["gated"]})
    other = x.clone()
    other[:, 1:] = 0
    torch.testing.assert_close(model(x)[:, 0], model(other)[:, 0])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (st.Gated(of=st.DoRA(targets="fc2")), "replaces what it finds"),
        (st.DoRA(of=st.Bottleneck()), "magnitude is not defined|add to the weight"),
        (st.DoRA(of=st.Union()), "modifies one method"),
        (st.Gated(of=st.LoRA(r=0)), "r must be at least 1"),
        (st.Union(of=()), "is empty"),
        (st.Union(of=(st.LoRA(r=0), st.Bottleneck(reduction=-1))), r"of\[0\] \(LoRA\).*of\[1\] \(Bottleneck\)"),
        (st.Union(of=(st.LoRA(), 3)), "must be tuple"),  # type: ignore[arg-type]
        (st.Union(of=(st.LoRA(r=2), st.Compacter(n=4))), "n=4 does not divide"),
    ],
)
def test_what_does_not_go_together_is_refused(spec: st.Spec, words: str) -> None:
    model = nn.Sequential(FeedForward())
    with pytest.raises(SpecError, match=words) as caught:
        st.attach(model, spec)
    assert caught.value.where
    assert caught.value.hint
    assert "slim_state" not in model.__dict__


def test_a_member_without_a_place_is_named() -> None:
    with pytest.raises(TargetError, match="q_proj"):
        st.attach(nn.Sequential(FeedForward()), st.Union(of=(st.LoRA(), st.LoRA(targets="q_proj"))))


def test_a_file_that_names_a_part_that_is_not_there(tmp_path: Path) -> None:
    model, _ = united("lora", "pfeiffer")
    op_of(model, "u").part = 7
    st.save(model, tmp_path / "u", name="u")
    other, _ = build({})
    with pytest.raises(MismatchError.__mro__[1], match="holds ops of 'lora'"):
        st.load(other, tmp_path / "u")


# ---- algebra ----------------------------------------------------------------------------------------------------------
def test_an_affine_union_converts_and_combines() -> None:
    model, x = united("lora", "ia3", "gain", "bitfit")
    with torch.no_grad():
        with st.use(model, "u"):
            full = model(x)
        with st.use(model, None):
            base = model(x)
        with st.use(model, "lora"):
            low = model(x)
        st.convert(model, "u", to=st.LoRA(r=6), name="as_lora")
        with st.use(model, "as_lora"):
            torch.testing.assert_close(model(x), full)
        st.combine(model, {"u": 0.5, "lora": 0.25}, how="svd", r=6, name="svd")
        st.combine(model, {"u": 0.5, "lora": 0.25}, name="linear")
        for how in ("svd", "linear"):
            with st.use(model, how):
                torch.testing.assert_close(model(x), base + 0.5 * (full - base) + 0.25 * (low - base))


def test_a_union_that_is_not_affine_neither_converts_nor_combines() -> None:
    model, _ = united("lora", "pfeiffer")
    with pytest.raises(CapabilityError, match="BottleneckOp"):
        st.convert(model, "u", name="x")
    with pytest.raises(CapabilityError, match="BottleneckOp"):
        st.combine(model, {"u": 0.5, "lora": 0.5}, how="svd", name="x")


def test_a_union_merges_to_disk(tmp_path: Path) -> None:
    from slimtune.testing import zoo

    model: Any = zoo.bert()
    st.attach(model, st.Union(of=(st.LoRA(r=2), st.IA3())), name="u")
    fill(model, "u", 0.05)
    ids = torch.randint(5, 99, (2, 6))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        st.merge(model, "u", out=tmp_path / "m")
        plain = type(zoo.bert()).from_pretrained(tmp_path / "m")
        torch.testing.assert_close(plain(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


def test_a_member_that_acts_while_it_trains() -> None:
    ada = st.AdaLoRA(init_r=4, target_r=1, t_init=1, t_final=1, delta_t=1, total_steps=6)
    model, x = build({"u": st.Union(of=(ada, st.Bottleneck()), targets="fc2")})
    adapter = adapter_of(model, "u")
    optimiser = torch.optim.Adam(st.param_groups(model, lr=1e-2))
    for _ in range(6):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    assert adapter.steps == 6
    op = op_of(model, "u")
    assert (op.method, int((op.E != 0).sum())) == ("adalora", 1)
    for modifier in (st.Gated, st.DoRA):
        with pytest.raises(SpecError, match="acts while it trains"):
            st.attach(model, modifier(of=st.AdaLoRA()), name="x")


def test_members_share_what_they_share_with_themselves_only(tmp_path: Path) -> None:
    spec = st.Union(of=(st.Compacter(reduction=2, n=2), st.VeRA(r=4), st.Compacter(reduction=1, n=2)), targets=("fc1", "fc2"))
    model, x = build({"u": spec})
    rules = [[op.rule for op in adapter_of(model, "u").ops.values() if op.part == i] for i in (0, 2)]  # type: ignore[union-attr]
    assert [len({id(t) for t in ts}) for ts in rules] == [1, 1]
    assert rules[0][0] is not rules[1][0]
    want = model(x)
    st.save(model, tmp_path / "u", name="u")
    other, _ = build({})
    st.load(other, tmp_path / "u")
    torch.testing.assert_close(other(x), want)
    again = [[op.rule for op in adapter_of(other, "u").ops.values() if op.part == i] for i in (0, 2)]  # type: ignore[union-attr]
    assert [len({id(t) for t in ts}) for ts in again] == [1, 1]
