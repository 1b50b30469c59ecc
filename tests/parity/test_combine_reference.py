"""combine beside the reference library's weighted adapters: equal where its maths is exact; where it is not, ours is shown to be.

The reference prunes and adds dense deltas only in its ..._svd ways; its plain "linear", "ties", ... work on the factors, so that cross terms
B_1 A_2 appear, and have no counterpart here.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import slimtune as st

warnings.filterwarnings("ignore")

PATHS = ("emb", "q", "k")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.q = nn.Linear(8, 6)
        self.k = nn.Linear(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.k(torch.tanh(self.q(self.emb(ids))))
        return out


IDS = torch.arange(10)[None]


def both(a: dict[str, Any], b: dict[str, Any]) -> tuple[Any, nn.Module]:
    """Return the reference's model and ours with the same two LoRAs."""
    torch.manual_seed(0)
    base = Net().double().eval()
    mine = Net().double().eval()
    mine.load_state_dict(base.state_dict())
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": list(PATHS), "init_lora_weights": False, **a}), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(**{"target_modules": list(PATHS), "init_lora_weights": False, **b}))
    for name in "ab":
        theirs.set_adapter(name)
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                if f".{name}" in key:
                    p.data = torch.randn(p.shape, dtype=torch.float64) * 0.5
        folder = theirs.active_adapter
        assert folder == name
    for name, config in (("a", a), ("b", b)):
        spec = st.LoRA(
            r=config["r"], alpha=config["lora_alpha"], rank_stabilised=config.get("use_rslora", False), up_bias=config.get("lora_bias", False),
            rank_pattern=config.get("rank_pattern"), alpha_pattern=config.get("alpha_pattern"), targets=tuple(config.get("target_modules", PATHS)),
        )  # fmt: skip
        st.attach(mine, spec, name=name)
        for (path, _), op in mine.slim_state.adapters[name].ops.items():  # type: ignore[union-attr, operator, index]
            layer = theirs.base_model.model.get_submodule(path)
            with torch.no_grad():
                if path == "emb":
                    op.A.copy_(layer.lora_embedding_A[name])
                    op.B.copy_(layer.lora_embedding_B[name])
                else:
                    op.A.copy_(layer.lora_A[name].weight)
                    op.B.copy_(layer.lora_B[name].weight)
                    if op.up_bias is not None:
                        op.up_bias.copy_(layer.lora_B[name].bias)
    return theirs, mine


def their_delta(model: Any, name: str, path: str) -> Tensor:
    return model.base_model.model.get_submodule(path).get_delta_weight(name).detach()  # type: ignore[no-any-return]


def our_delta(model: nn.Module, name: str, path: str) -> Tensor:
    found = [op.delta() for (p, _), op in model.slim_state.adapters[name].ops.items() if p == path]  # type: ignore[union-attr, operator, index]
    return sum(found).detach()  # type: ignore[union-attr, return-value]


A, B = {"r": 2, "lora_alpha": 3}, {"r": 4, "lora_alpha": 4}
WAYS = [
    ("cat", "cat", {}, {}),
    ("svd", "svd", {}, {}),
    ("svd", "svd", {"svd_rank": 3}, {"r": 3}),
    ("ties_svd", "ties_svd", {"density": 0.5}, {"density": 0.5}),
    ("ties_svd", "ties", {"density": 0.5}, {"density": 0.5}),
    ("ties_svd", "ties", {"density": 0.25, "majority_sign_method": "frequency"}, {"density": 0.25, "majority": "frequency"}),
    ("magnitude_prune_svd", "magnitude_prune", {"density": 0.5}, {"density": 0.5}),
]


@pytest.mark.parametrize(("theirs", "ours", "options", "mine"), WAYS, ids=[f"{w[0]}-{w[1]}-{i}" for i, w in enumerate(WAYS)])
def test_equal_deltas(theirs: str, ours: str, options: dict[str, Any], mine: dict[str, Any]) -> None:
    reference, model = both(A, B)
    reference.add_weighted_adapter(["a", "b"], [0.75, 1.5], "mix", combination_type=theirs, **options)
    report = st.combine(model, {"a": 0.75, "b": 1.5}, how=ours, name="mix", **mine)
    for path in PATHS:
        torch.testing.assert_close(our_delta(model, "mix", path), their_delta(reference, "mix", path), rtol=1e-7, atol=1e-10)
    assert set(report.ranks()) == set(PATHS)


def test_rank_stabilised_scales_are_ours_alone() -> None:
    """The reference gives the mixture the first adapter's rank-stabilised scale, for which its factors were not made."""
    reference, model = both({**A, "use_rslora": True}, {**B, "use_rslora": True})
    reference.add_weighted_adapter(["a", "b"], [0.75, -1.5], "mix", combination_type="svd", svd_rank=4)
    st.combine(model, {"a": 0.75, "b": -1.5}, how="svd", r=4, name="mix")
    st.combine(model, {"a": 0.75, "b": -1.5}, name="exact")
    for path in PATHS:
        exact = 0.75 * our_delta(model, "a", path) - 1.5 * our_delta(model, "b", path)
        for name, alpha in (("a", 0.75), ("b", -1.5)):  # the two libraries agree on what the adapters are
            torch.testing.assert_close(alpha * our_delta(model, name, path), alpha * their_delta(reference, name, path))
        torch.testing.assert_close(our_delta(model, "exact", path), exact)
        U, S, V = torch.linalg.svd(exact)
        best = (U[:, :4] * S[:4]) @ V[:4]
        torch.testing.assert_close(our_delta(model, "mix", path), best)
        torch.testing.assert_close(their_delta(reference, "mix", path), 2 * best)  # 4 / sqrt(4) too much


def test_biases_are_ours_alone() -> None:
    """The reference leaves the biases of the up projections behind."""
    places = {"target_modules": ["q", "k"], "lora_bias": True}
    reference, model = both({**A, **places}, {**B, **places})
    reference.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mix", combination_type="cat")
    st.combine(model, {"a": 0.5, "b": 0.5}, name="mix")
    with torch.no_grad():
        with st.use(model, {"a": 0.5, "b": 0.5}):
            want = model(IDS)
        with st.use(model, "mix"):
            torch.testing.assert_close(model(IDS), want)
        reference.set_adapter("mix")
        assert not torch.allclose(reference(IDS), want, rtol=1e-2)


def test_patterns_and_places_are_ours_alone() -> None:
    """Ranks and scales that differ by module, and modules that only one adapter has."""
    a = {**A, "rank_pattern": {"q": 3}, "alpha_pattern": {"q": 9}, "target_modules": ["q", "k"]}
    reference, model = both(a, {**B, "target_modules": ["emb", "q"]})
    report = st.combine(model, {"a": 2, "b": -1}, how="cat", name="mix")
    assert report.ranks() == {"emb": 4, "q": 6, "k": 2}  # no padding with zeros: 3 + 4 directions in a matrix of 6
    for path, names in (("emb", "b"), ("q", "ab"), ("k", "a")):
        exact = sum({"a": 2, "b": -1}[n] * their_delta(reference, n, path) for n in names)
        torch.testing.assert_close(our_delta(model, "mix", path), exact)


def test_our_mixture_loads_there(tmp_path: Any) -> None:
    torch.manual_seed(0)
    _, model = both({**A, "use_rslora": True, "rank_pattern": {"k": 1}}, B)
    report = st.combine(model, {"a": 0.5, "b": 0.5}, how="svd", energy=0.9, name="mix")
    assert len(set(report.ranks().values())) > 1
    st.save(model, tmp_path / "mix", name="mix")
    base = Net().double().eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "slim" not in k})
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "mix").double()
    with torch.no_grad(), st.use(model, "mix"):
        torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-5)
