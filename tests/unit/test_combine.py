"""combine and reduce against dense formulas in float64: exact sums, TIES, DARE, pruning, ranks, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from algebra_net import EVERYTHING, IDS, LINEAR, Net, delta, fill, net, out, with_adapters
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import slimtune as st
from slimtune.algebra.prune import Pruning
from slimtune.core.errors import CapabilityError, MergeError, NameInUse, NoSuchAdapter, SpecError

# ---- exact sums -------------------------------------------------------------------------------------------------------
PAIRS = {
    "ranks, scales and targets differ": (st.LoRA(r=2, alpha=3, targets=("q", "k")), st.LoRA(r=4, alpha=16, rank_stabilised=True, targets=("k", "o"))),
    "patterns": (
        st.LoRA(r=2, rank_pattern={"k": 3}, alpha_pattern={"o": 7}, rank_stabilised=True, targets=LINEAR), st.LoRA(r=2, targets=LINEAR)
    ),
    "biases, with and without one of the module": (st.LoRA(r=2, up_bias=True, targets=LINEAR), st.LoRA(r=3, up_bias=True, targets=LINEAR)),
    "frozen starts": (st.LoRA(r=2, init="pissa", targets=LINEAR), st.LoRA(r=2, init="olora", targets=LINEAR)),
    "embedding and grouped convolution": (st.LoRA(r=2, targets=EVERYTHING), st.LoRA(r=4, targets=EVERYTHING)),
    "another method": (st.LoRA(r=2, targets=LINEAR), st.VeRA(r=3, targets=LINEAR)),
    "no factors": (st.LoRA(r=2, targets=LINEAR), st.MoRA(r=1, targets=LINEAR)),
    "factors of y": (st.LoRA(r=2, targets=LINEAR), st.IA3(targets=("q", "k"), feedforward=("k",))),
    "biases only": (st.LoRA(r=2, targets=("q",)), st.BitFit(targets=("q", "k", "norm"), missing="add")),
    "norms": (st.LoRA(r=2, targets=("q",)), st.LayerNormTuning()),
    "a union": (st.Union(of=(st.LoRA(r=2, targets=("q",)), st.IA3(targets=("q", "k"), feedforward=()))), st.LoRA(r=2, targets=("q",))),
    "a head trained in full": (st.LoRA(r=2, targets=("q",), train_modules=("o",)), st.LoRA(r=2, targets=("q", "o"))),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_linear_is_the_exact_weighted_sum(pair: tuple[st.Spec, st.Spec], tmp_path: Path) -> None:
    model = with_adapters(a=pair[0], b=pair[1])
    weights = {"a": 0.7, "b": -1.3}
    want = out(model, weights)
    assert not torch.allclose(want, out(model, "a"))
    report = st.combine(model, weights, name="mix")
    assert report.worst == 0
    torch.testing.assert_close(out(model, "mix"), want, rtol=1e-9, atol=1e-9)
    st.save(model, tmp_path / "mix", name="mix")
    other = net()
    st.load(other, tmp_path / "mix", dtype=torch.float64)
    torch.testing.assert_close(out(other, "mix"), want, rtol=1e-9, atol=1e-9)
    st.use(model, ["mix"])
    st.merge(model, "mix")
    torch.testing.assert_close(model(IDS), want, rtol=1e-9, atol=1e-9)


CLOSED = {
    "ia3": st.IA3(targets=("q", "k", "o"), feedforward=("o",)),
    "bitfit": st.BitFit(targets=("q", "norm")),
    "dense": st.Dense(targets=("o", "norm")),
    "ln_tuning": st.LayerNormTuning(),
    "mora": st.MoRA(r=1, targets=LINEAR),
}


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear"])
@pytest.mark.parametrize("method", CLOSED)
def test_the_method_stays_where_it_can(method: str, how: str) -> None:
    model = with_adapters(a=CLOSED[method], b=CLOSED[method])
    weights = {"a": 0.7, "b": -1.3}
    want = out(model, weights)
    st.combine(model, weights, name="mix", how=how, density=None if how == "linear" else 1.0)
    adapters = model.slim_state.adapters  # type: ignore[union-attr]
    assert adapters["mix"].spec == CLOSED[method]
    assert {k: type(op) for k, op in adapters["mix"].ops.items()} == {k: type(op) for k, op in adapters["a"].ops.items()}
    if how != "ties":  # with nothing pruned only TIES still drops entries of the minority's sign
        torch.testing.assert_close(out(model, "mix"), want, rtol=1e-9, atol=1e-9)
    else:
        op, ops = next(iter(adapters["mix"].ops.values())), [next(iter(adapters[n].ops.values())) for n in "ab"]
        name, start = next(iter(op.linear_in.items()))
        vectors = [getattr(o, name) - start for o in ops]
        torch.testing.assert_close(getattr(op, name) - start, ties(vectors, [0.7, -1.3], 1.0))


def test_the_same_method_at_different_places() -> None:
    model = with_adapters(a=st.BitFit(targets=("conv",)), b=st.BitFit(targets=("norm",)))
    want = out(model, {"a": 1.0, "b": 2.0})
    report = st.combine(model, {"a": 1.0, "b": 2.0}, name="mix")
    assert report.method == "bitfit"
    spec = model.slim_state.adapters["mix"].spec  # type: ignore[union-attr, operator, index]
    assert [s.path for s in spec.sites(net())] == ["conv", "norm"]
    torch.testing.assert_close(out(model, "mix"), want)


def test_factors_side_by_side_and_no_more_than_the_matrix_has() -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=("q", "o")), b=st.LoRA(r=3, targets=("q",)), c=st.LoRA(r=6, targets=("q",)))
    assert st.combine(model, {"a": 1, "b": 1}, name="cat", how="cat").ranks() == {"q": 5, "o": 2}
    want = out(model, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert st.combine(model, {"a": 1, "b": 1, "c": 1}, name="all").ranks() == {"q": 8, "o": 2}  # 11 directions in a matrix of 8
    torch.testing.assert_close(out(model, "all"), want)


def test_scaling_and_negation() -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=LINEAR), b=st.LoRA(r=3, targets=LINEAR))
    st.combine(model, {"a": 1, "b": 1}, name="sum")
    st.combine(model, {"sum": 1, "b": -1}, name="back")
    torch.testing.assert_close(out(model, "back"), out(model, "a"))
    st.combine(model, {"a": -0.5}, name="minus")
    torch.testing.assert_close(out(model, "minus"), out(model, {"a": -0.5}))


def test_dense_on_request() -> None:
    model = with_adapters(a=st.LoRA(r=2, up_bias=True, targets=LINEAR), b=st.LoRA(r=3, targets=LINEAR))
    report = st.combine(model, {"a": 1, "b": 1}, name="mix", dense=True)
    assert report.method == "dense"
    assert not report.ranks()
    torch.testing.assert_close(out(model, "mix"), out(model, {"a": 1.0, "b": 1.0}))


# ---- truncated --------------------------------------------------------------------------------------------------------
def test_svd_is_the_best_of_its_rank_and_says_how_good() -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=EVERYTHING), b=st.LoRA(r=4, rank_stabilised=True, targets=EVERYTHING))
    report = st.combine(model, {"a": 0.5, "b": 2}, name="mix", how="svd")
    assert report.ranks() == dict.fromkeys(EVERYTHING, 4)
    for path in EVERYTHING:
        dense = 0.5 * delta(model, "a", path) + 2 * delta(model, "b", path)
        got = delta(model, "mix", path)
        stack = dense.reshape(2, 4, -1) if path == "conv" else dense.flatten(1)[None]  # a grouped convolution has a rank in each group
        U, S, V = torch.linalg.svd(stack, full_matrices=False)
        q = 2 if path == "conv" else 4
        best = (U[..., :q] * S[:, None, :q]) @ V[:, :q]
        torch.testing.assert_close(got.reshape(best.shape), best)
        torch.testing.assert_close(report.errors[path], float((got - dense).norm() / dense.norm()))
    assert report.worst == max(report.errors.values()) > 0


def test_energy_takes_the_smallest_rank_that_keeps_it() -> None:
    model = with_adapters(a=st.LoRA(r=4, targets=EVERYTHING), b=st.LoRA(r=4, targets=EVERYTHING))
    report = st.combine(model, {"a": 1, "b": 1}, name="mix", how="svd", energy=0.9)
    for path in ("q", "k", "o", "emb"):
        S = torch.linalg.svdvals(delta(model, "a", path) + delta(model, "b", path)).square()
        r = report.ranks()[path]
        assert S[:r].sum() >= 0.9 * S.sum() > S[: r - 1].sum()
        torch.testing.assert_close(report.errors[path], math.sqrt(float(S[r:].sum() / S.sum())))
    spec = model.slim_state.adapters["mix"].spec  # type: ignore[union-attr, operator, index]
    for site in spec.sites(model):
        assert spec.rank(site) == report.ranks()[site.path]
        assert spec.scale(site) == 1.0


def test_reduce(tmp_path: Path) -> None:
    model = with_adapters(a=st.LoRA(r=6, targets=LINEAR))
    report = st.reduce(model, "a", r=2, name="small")
    for path in LINEAR:
        U, S, V = torch.linalg.svd(delta(model, "a", path))
        torch.testing.assert_close(delta(model, "small", path), (U[:, :2] * S[:2]) @ V[:2])
    assert report.rows[0].total < 8 * 6
    assert st.reduce(model, "a", energy=1.0, name="whole").worst < 1e-12
    torch.testing.assert_close(out(model, "whole"), out(model, "a"))


@settings(max_examples=25, deadline=None)
@given(
    m=some.integers(1, 7), k=some.integers(1, 7), q=some.integers(1, 9), r=some.integers(1, 9), zero=some.booleans(), seed=some.integers(0, 999)
)
def test_factored_truncation_equals_the_dense_one(m: int, k: int, q: int, r: int, zero: bool, seed: int) -> None:
    from slimtune.algebra.change import Change, site_at
    from slimtune.algebra.shorten import shorten

    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(1, q, k, generator=draw, dtype=torch.float64)
    B = torch.randn(1, m, q, generator=draw, dtype=torch.float64) * (not zero)
    site = site_at(nn.Sequential(nn.Linear(k, m).double()), "0", "weight")
    short, dense = (shorten(c, r, None) for c in (Change(site, pair=(A, B)), Change(site, pieces=lambda i: B @ A)))
    torch.testing.assert_close(short.B @ short.A, dense.B @ dense.A)
    assert abs(short.error - dense.error) < 1e-7
    assert short.r == min(r, q, m, k)
    assert bool((short.A.abs().sum(-1) > 0).all()), "a direction is dead: zero in both factors gets no gradient"


# ---- TIES, DARE, magnitude --------------------------------------------------------------------------------------------
def trim(t: Tensor, density: float) -> Tensor:
    bound = t.abs().flatten().sort(descending=True).values[round(density * t.numel()) - 1]
    return torch.where(t.abs() >= bound, t, 0)


def ties(vectors: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Section 3 of the paper, entry by entry, with a weight's sign turning its vector round and its size scaling it."""
    kept = [math.copysign(1, w) * trim(v, density) for v, w in zip(vectors, weights, strict=True)]
    elected = torch.where(sum(kept) >= 0, 1.0, -1.0)  # type: ignore[arg-type]
    total, count = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for t, w in zip(kept, weights, strict=True):
        agrees = (t * elected) > 0
        total += torch.where(agrees, abs(w) * t, 0)
        count += agrees
    return total / count.clamp(min=1)


WEIGHTS = {"a": 1.0, "b": 0.5, "c": -2.0}


def three() -> nn.Module:
    return with_adapters(
        a=st.LoRA(r=2, targets=("q", "o")), b=st.LoRA(r=3, targets=("q", "o"), rank_stabilised=True), c=st.MoRA(r=1, targets=("q",))
    )


def test_ties_works_on_deltas() -> None:
    model = three()
    st.combine(model, WEIGHTS, how="ties", density=0.5, dense=True, name="mix")
    for path, names in (("q", "abc"), ("o", "ab")):
        want = ties([delta(model, n, path) for n in names], [WEIGHTS[n] for n in names], 0.5)
        torch.testing.assert_close(delta(model, "mix", path), want)
    report = st.combine(model, WEIGHTS, how="ties", density=0.5, name="short")  # as a LoRA of the highest rank there
    assert report.ranks() == {"q": 3, "o": 3}
    U, S, V = torch.linalg.svd(delta(model, "mix", "q"))
    torch.testing.assert_close(delta(model, "short", "q"), (U[:, :3] * S[:3]) @ V[:3])
    assert st.combine(model, WEIGHTS, how="ties_svd", density=0.5, r=8, name="long").ranks() == {"q": 8, "o": 6}
    torch.testing.assert_close(delta(model, "long", "q"), delta(model, "mix", "q"))


def test_magnitude_pruning() -> None:
    model = three()
    st.combine(model, WEIGHTS, how="magnitude_prune", density=0.25, dense=True, name="mix")
    want = sum(WEIGHTS[n] * trim(delta(model, n, "q"), 0.25) for n in "abc")
    torch.testing.assert_close(delta(model, "mix", "q"), want)


def test_the_majority_can_be_a_number() -> None:
    vectors = [torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, 5.0])]
    terms = [(v, 1.0, str(i)) for i, v in enumerate(vectors)]
    assert Pruning("ties", 1.0, "total")(terms).tolist() == [3.0, 5.0]
    assert Pruning("ties", 1.0, "frequency")(terms).tolist() == [-1.0, -1.0]


def test_dare_drops_and_rescales_by_its_seed() -> None:
    t = torch.randn(200, 200, dtype=torch.float64)
    one = Pruning("dare_linear", 0.3, seed=1)([(t, 1.0, "a")])
    kept = one != 0
    assert abs(float(kept.double().mean()) - 0.3) < 0.01
    torch.testing.assert_close(one[kept], (t / 0.3)[kept])
    assert torch.equal(one, Pruning("dare_linear", 0.3, seed=1)([(t, 1.0, "a")]))
    for other in (Pruning("dare_linear", 0.3, seed=2)([(t, 1.0, "a")]), Pruning("dare_linear", 0.3, seed=1)([(t, 1.0, "b")])):
        assert abs(float((kept & (other != 0)).double().mean()) - 0.09) < 0.01  # independent draws
    many = torch.stack([Pruning("dare_linear", 0.3, seed=s)([(t[:20], 1.0, "a")]) for s in range(300)]).mean(0)
    assert float((many - t[:20]).norm() / t[:20].norm()) < 0.15  # unbiased

    model = with_adapters(a=st.LoRA(r=2, targets=LINEAR), b=st.LoRA(r=2, targets=LINEAR))
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the global generator has no part in it
        st.combine(model, {"a": 1, "b": 1}, how="dare_ties", density=0.5, seed=seed, name=f"m{i}")
    assert torch.equal(delta(model, "m0", "q"), delta(model, "m1", "q"))
    assert not torch.allclose(delta(model, "m0", "q"), delta(model, "m2", "q"))


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_with_nothing_pruned_the_linear_ones_are_the_sum(how: str) -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=LINEAR), b=st.LoRA(r=2, targets=LINEAR))
    st.combine(model, {"a": 1, "b": 2}, how=how, density=1.0, dense=True, name="mix")
    want = delta(model, "a", "q") + 2 * delta(model, "b", "q")
    got = delta(model, "mix", "q")
    assert torch.allclose(got, want) == ("ties" not in how)


# ---- experts ----------------------------------------------------------------------------------------------------------
def test_experts_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.algebra.change import Change
    from slimtune.testing.cases import case

    experts = case("experts")
    model = experts.build()
    for i, name in enumerate("ab"):
        st.attach(model, st.LoRA(r=2, targets=("body",)), name=name)
        fill(model, name, i)
    shapes: list[tuple[int, ...]] = []
    piece = Change.piece

    def watched(self: Change, i: int) -> Tensor:
        found = piece(self, i)
        shapes.append(tuple(found.shape))
        return found

    monkeypatch.setattr(Change, "piece", watched)
    report = st.combine(model, {"a": 1, "b": 1}, how="ties", density=0.5, energy=0.99, name="mix")
    assert {s[0] for s in shapes} == {1}
    monkeypatch.undo()
    st.combine(model, {"a": 1, "b": 1}, how="ties", density=0.5, dense=True, name="dense")
    ops = {n: model.slim_state.adapters[n].ops for n in ("a", "b", "mix", "dense")}  # type: ignore[union-attr, operator, index]
    for key, op in ops["dense"].items():
        for e in range(4):
            torch.testing.assert_close(op.D[e], ties([ops["a"][key].delta()[e], ops["b"][key].delta()[e]], [1, 1], 0.5))
        gap = float((ops["mix"][key].delta() - op.D).norm() / op.D.norm())
        torch.testing.assert_close(gap, report.errors[f"body.{key[1]}"])
        assert 0 < gap <= 0.1  # 99 % of the energy of all experts together


# ---- the new adapter is one like any other ----------------------------------------------------------------------------
def test_it_trains_mixes_and_detaches() -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=LINEAR), b=st.LoRA(r=2, targets=LINEAR))
    st.use(model, "a")
    st.combine(model, {"a": 1, "b": 1}, how="svd", r=2, name="mix")
    assert model.slim_state.default.names == {"a"}  # type: ignore[union-attr]
    rows = ["mix", "a", None, {"b": 0.5}]
    with torch.no_grad(), st.use(model, rows=rows):
        mixed = model(IDS)
    for i, which in enumerate(rows):
        torch.testing.assert_close(mixed[i], out(model, which)[i])
    st.use(model, "mix")
    before = copy.deepcopy(model.slim_state.adapters["mix"].ops)  # type: ignore[union-attr, operator, index]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(IDS).square().mean()
    loss.backward()
    optimiser.step()
    after = model.slim_state.adapters["mix"].ops  # type: ignore[union-attr, operator, index]
    assert all(not torch.equal(after[k].A, before[k].A) and not torch.equal(after[k].B, before[k].B) for k in after)
    assert float(model(IDS).detach().square().mean()) < float(loss.detach())
    for name in ("a", "b", "mix"):
        st.detach(model, name)
    assert type(model) is Net


def test_half_precision_base_gets_float32_adapters() -> None:
    model = Net().bfloat16()
    for i, name in enumerate("ab"):
        st.attach(model, st.LoRA(r=2, targets=LINEAR), name=name)
        fill(model, name, i)
    st.combine(model, {"a": 1, "b": 1}, how="svd", name="mix")
    st.combine(model, {"a": 1, "b": 1}, how="svd", name="half", dtype=torch.bfloat16)
    types = {n: {p.dtype for p in model.slim_state.adapters[n].parameters()} for n in ("mix", "half")}  # type: ignore[union-attr, operator, index]
    assert types == {"mix": {torch.float32}, "half": {torch.bfloat16}}


# ---- what is refused --------------------------------------------------------------------------------------------------
REFUSED = {
    "no such way": (dict(how="average"), SpecError, "linear, cat, svd"),
    "no density": (dict(how="ties"), SpecError, "density="),
    "odd density": (dict(how="ties", density=1.5), SpecError, "at most 1"),
    "density for nothing": (dict(density=0.5), SpecError, "belongs to"),
    "rank for nothing": (dict(r=4), SpecError, 'how="svd"'),
    "two rules": (dict(how="svd", r=4, energy=0.9), SpecError, "not both"),
    "odd rank": (dict(how="svd", r=0), SpecError, "at least 1"),
    "odd energy": (dict(how="svd", energy=0), SpecError, "share"),
    "dense and a rank": (dict(how="svd", dense=True), SpecError, "exact"),
    "odd majority": (dict(how="ties", density=0.5, majority="loudest"), SpecError, "frequency"),
    "name in use": (dict(name="a"), NameInUse, "called 'a'"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_options_that_make_no_sense(case: tuple[dict[str, object], type[Exception], str]) -> None:
    model = with_adapters(a=st.LoRA(r=2, targets=LINEAR), b=st.LoRA(r=2, targets=LINEAR))
    with pytest.raises(case[1]) as caught:
        st.combine(model, {"a": 1, "b": 1}, **{"name": "mix", **case[0]})  # type: ignore[arg-type]
    assert case[2] in str(caught.value)
    assert set(model.slim_state.adapters) == {"a", "b"}  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [{}, {"a": "1"}, {"a": float("nan")}, {"a": True}, ["a", "b"]], ids=str)
def test_odd_weights(weights: object) -> None:
    with pytest.raises(SpecError, match="a"):
        st.combine(with_adapters(a=st.LoRA(r=2, targets=LINEAR)), weights, name="mix")  # type: ignore[arg-type]


def test_methods_that_cannot_be_added_say_why() -> None:
    model = with_adapters(
        a=st.LoRA(r=2, targets=LINEAR),
        dora=st.DoRA(of=st.LoRA(r=2, targets=LINEAR)),
        neck=st.Bottleneck(targets=("o",)),
        mora=st.MoRA(r=1, targets=LINEAR),
    )
    for name, reason, hint in (("dora", "no fixed summand", "st.convert(model, 'dora'"), ("neck", "no affine map", "st.use")):
        with pytest.raises(CapabilityError) as caught:
            st.combine(model, {"a": 1, name: 1}, name="mix")
        assert reason in caught.value.what
        assert hint in caught.value.hint
        assert name in caught.value.what
    with pytest.raises(CapabilityError, match="no factors"):
        st.combine(model, {"a": 1, "mora": 1}, how="cat", name="mix")
    with pytest.raises(SpecError, match="no adapter here has a rank"):
        st.combine(model, {"mora": 1}, how="svd", name="mix")
    with pytest.raises(NoSuchAdapter):
        st.combine(model, {"a": 1, "z": 1}, name="mix")
    with pytest.raises(SpecError, match="new rank"):
        st.reduce(model, "a", name="mix")
    st.convert(model, "dora", to=st.LoRA(r=8), name="plain")
    st.combine(model, {"a": 1, "plain": 1}, name="mix")
    st.merge(model, "a")
    with pytest.raises(MergeError):
        st.combine(model, {"a": 1}, name="late")


def test_a_foreign_grouped_convolution_is_refused_by_its_own_reason() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=2))
    st.attach(model, st.LoRA(r=2, targets=("0",)), name="wide")
    op = next(iter(model.slim_state.adapters["wide"].ops.values()))  # type: ignore[union-attr, operator, index]
    op.A = nn.Parameter(torch.randn(2, 8, 3))  # the reference library's layout: every group reads all inputs
    with pytest.raises(CapabilityError, match="grouped weight"):
        st.combine(model, {"wide": 1}, name="mix")


def test_tied_tokens_stay_tied(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def tied() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31, tie_word_embeddings=True
        )
        return LlamaForCausalLM(config).eval()

    model = tied()
    for i, name in enumerate("ab"):
        st.attach(model, st.TrainableTokens(tokens=(3, 5)), name=name)
        fill(model, name, i)
    ids = torch.tensor([[1, 3, 5, 7]])
    with torch.no_grad():
        with st.use(model, {"a": 0.5, "b": 2.0}):
            want = model(ids).logits
        st.combine(model, {"a": 0.5, "b": 2.0}, name="mix")
        ops = list(model.slim_state.adapters["mix"].ops.values())  # type: ignore[union-attr, operator, index]
        assert len(ops) == 2
        assert ops[0].D is ops[1].D
        assert ops[0].D is not next(iter(model.slim_state.adapters["a"].ops.values())).D  # type: ignore[union-attr, operator, index]
        with st.use(model, "mix"):
            torch.testing.assert_close(model(ids).logits, want)
        st.save(model, tmp_path / "mix", name="mix")
        other = tied()
        st.load(other, tmp_path / "mix")
        torch.testing.assert_close(other(ids).logits, want)
        st.attach(model, st.LoRA(r=2), name="lora")
        fill(model, "lora", 3)
        with st.use(model, {"a": 1.0, "lora": 1.0}):
            want = model(ids).logits
        st.combine(model, {"a": 1, "lora": 1}, name="both")
        with st.use(model, "both"):
            torch.testing.assert_close(model(ids).logits, want)
