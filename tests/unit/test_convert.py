"""convert: any affine method as a LoRA: exact at full rank, the best of its rank below, with the error told; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from algebra_net import IDS, LINEAR, delta, out, with_adapters
from torch import nn

import slimtune as st
from slimtune.algebra.merge import merged_sites, merged_values
from slimtune.core.errors import CapabilityError, MergeError, SpecError
from slimtune.core.plan import Plan

METHODS = {
    "dora": st.DoRA(of=st.LoRA(r=2, targets=LINEAR)),
    "dora everywhere": st.DoRA(of=st.LoRA(r=2, targets=("q", "emb", "conv"))),
    "ia3, outputs": st.IA3(targets=LINEAR, feedforward=()),
    "ia3, inputs": st.IA3(targets=LINEAR, feedforward=LINEAR),
    "mora": st.MoRA(r=1, targets=LINEAR),
    "vera": st.VeRA(r=4, targets=LINEAR),
    "dense": st.Dense(targets=(*LINEAR, "emb", "conv")),
    "lora with biases": st.LoRA(r=3, up_bias=True, targets=LINEAR),
}


@pytest.mark.parametrize("method", METHODS)
def test_exact_at_full_rank(method: str, tmp_path: Path) -> None:
    model = with_adapters(a=METHODS[method])
    want = out(model, "a")
    report = st.convert(model, "a", to=st.LoRA(r=12), name="b")
    assert report.method == "lora"
    assert report.worst < 1e-12
    torch.testing.assert_close(out(model, "b"), want, rtol=1e-9, atol=1e-9)
    st.save(model, tmp_path / "b", name="b")
    assert '"peft_type": "LORA"' in (tmp_path / "b" / "adapter_config.json").read_text()
    st.convert(model, "a", to=st.Dense(), name="c")
    torch.testing.assert_close(out(model, "c"), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_its_rank_below(method: str) -> None:
    model = with_adapters(a=METHODS[method])
    report = st.convert(model, "a", to=st.LoRA(r=2, alpha=5, dropout=0.0, rank_stabilised=True), name="b")
    assert set(report.ranks().values()) == {2}
    for path, error in report.errors.items():
        dense = delta(model, "a", path)
        stack = dense.reshape(2, 4, -1) if path == "conv" else dense.flatten(1)[None]
        S = torch.linalg.svdvals(stack)
        q = 1 if path == "conv" else 2
        torch.testing.assert_close(error, float((S[:, q:].square().sum() / S.square().sum()).sqrt()), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(float((delta(model, "b", path) - dense).norm() / dense.norm()), error, rtol=1e-5, atol=1e-9)
    ops = model.slim_state.adapters["b"].ops.values()  # type: ignore[union-attr, operator, index]
    assert {round(op.scale, 9) for op in ops if op.method == "lora"} == {round(5 / 2**0.5, 9)}


def test_energy_and_the_recipe_it_leaves() -> None:
    model = with_adapters(a=METHODS["dora"])
    report = st.convert(model, "a", to=st.LoRA(r=2, alpha=6), energy=0.8, name="b")
    spec = model.slim_state.adapters["b"].spec  # type: ignore[union-attr, operator, index]
    assert len(set(report.ranks().values())) > 1
    for site in spec.sites(with_adapters(x=st.LoRA(targets=("q",)))):
        S = torch.linalg.svdvals(delta(model, "a", site.path)).square()
        r = report.ranks()[site.path]
        assert S[:r].sum() >= 0.8 * S.sum() > S[: r - 1].sum()
        assert spec.rank(site) == r
        assert spec.scale(site) == 3.0


def test_rank_patterns_of_the_target_count() -> None:
    model = with_adapters(a=METHODS["mora"])
    assert st.convert(model, "a", to=st.LoRA(r=2, rank_pattern={"k": 5}), name="b").ranks() == {"q": 2, "k": 5, "o": 2}


def test_a_stack_becomes_one() -> None:
    model = with_adapters(a=METHODS["dora"], b=st.LoRA(r=2, targets=("q",)), c=st.IA3(targets=LINEAR, feedforward=()))
    for stack in (["a", "b", "c"], ["c", "b", "a"]):
        st.convert(model, stack, to=st.LoRA(r=12), name="d")
        torch.testing.assert_close(out(model, "d"), out(model, stack), rtol=1e-9, atol=1e-9)
        st.detach(model, "d")


def test_norms_heads_and_biases_come_along() -> None:
    model = with_adapters(a=st.VeRA(r=4, targets=("q", "k"), train_modules=("o", "norm")))
    report = st.convert(model, "a", to=st.LoRA(r=8), name="b")
    assert set(report.ranks()) == {"q", "k"}
    assert any("kept as dense deltas" in note for note in report.notes)
    torch.testing.assert_close(out(model, "b"), out(model, "a"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantised_bases_are_dequantised_weight_by_weight(name: str) -> None:
    from slimtune.testing.cases import case

    model = case(name).build()
    st.attach(model, st.IA3(targets=("body",), feedforward=()), name="a")
    with torch.no_grad():
        next(iter(model.slim_state.adapters["a"].parameters())).normal_(1, 0.3)  # type: ignore[union-attr, operator, index]
    report = st.convert(model, "a", to=st.LoRA(r=32), name="b")
    assert report.worst < 1e-6
    values = []
    for which in "ab":
        links = Plan.of(which).segments[0][1]
        module, param, chain = merged_sites(model, links)[0]
        values.append(merged_values(module, param, chain))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-4, atol=1e-5)
    if values[0][1] is not None:
        torch.testing.assert_close(values[1][1], values[0][1], rtol=1e-4, atol=1e-5)


def test_a_bias_goes_where_files_of_the_reference_can_hold_it() -> None:
    model = with_adapters(a=st.LoRA(r=2, up_bias=True, targets=("q", "k")))
    st.convert(model, "a", to=st.LoRA(r=2), name="b")
    ops = model.slim_state.adapters["b"].ops  # type: ignore[union-attr, operator, index]
    held = {(path, op.method): op for (path, _), op in ops.items()}
    assert set(held) == {("q", "lora"), ("q", "bitfit"), ("k", "lora")}  # q has a bias of its own, k has none
    assert held["q", "lora"].up_bias is None
    assert held["k", "lora"].up_bias is not None
    torch.testing.assert_close(out(model, "b"), out(model, "a"))


def test_it_may_be_shortened_by_training_on() -> None:
    model = with_adapters(a=METHODS["dora"])
    st.convert(model, "a", to=st.LoRA(r=2), name="b")
    want = out(model, "a")
    st.use(model, "b")
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(IDS) - want).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.3 * losses[0]


# ---- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("to", "energy", "word"),
    [
        (st.IA3(), None, "not to ia3"),
        ("lora", None, "not to"),
        (st.DoRA(), None, "not to dora"),
        (st.LoRA(r=0), None, "at least 1"),
        (st.LoRA(targets=("q",)), None, "targets="),
        (st.LoRA(train_modules=("o",)), None, "train_modules="),
        (st.LoRA(up_bias=True), None, "up_bias"),
        (st.LoRA(), 1.5, "share"),
        (st.Dense(), 0.9, "exact"),
    ],
    ids=str,
)
def test_targets_that_make_no_sense(to: object, energy: float | None, word: str) -> None:
    model = with_adapters(a=METHODS["mora"])
    with pytest.raises(SpecError) as caught:
        st.convert(model, "a", to=to, energy=energy, name="b")  # type: ignore[arg-type]
    assert word in str(caught.value)
    assert set(model.slim_state.adapters) == {"a"}  # type: ignore[union-attr]


def test_what_has_no_rank_says_so() -> None:
    model = with_adapters(
        bits=st.BitFit(targets=("q",)), norms=st.LayerNormTuning(), neck=st.Bottleneck(targets=("o",)), lora=st.LoRA(r=2, targets=("q",))
    )
    for name, reason in (("bits", "only biases"), ("norms", "no matrix"), ("neck", "no affine map")):
        with pytest.raises(CapabilityError) as caught:
            st.convert(model, name, name="x")
        assert reason in caught.value.what
        assert caught.value.hint
    with pytest.raises(CapabilityError, match="no affine map"):
        st.convert(model, ["lora", "neck"], name="x")
    for odd in ([], ["lora", "lora"]):
        with pytest.raises(SpecError, match="stack"):
            st.convert(model, odd, name="x")
    st.merge(model, "lora")
    with pytest.raises(MergeError):
        st.convert(model, "lora", name="x")


def test_a_model_that_is_one_layer() -> None:
    model = nn.Linear(6, 5).double()
    st.attach(model, st.LoRA(r=3, targets=("",)), name="a")
    with torch.no_grad():
        for p in model.slim_state.adapters["a"].parameters():  # type: ignore[union-attr, operator, index]
            p.normal_()
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        st.convert(model, "a", to=st.LoRA(r=3), name="b")
        st.use(model, "b")
        torch.testing.assert_close(model(x), want)
