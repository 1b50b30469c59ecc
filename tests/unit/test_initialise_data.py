"""Initialisers that look at data: the papers' formulas in float64, ranks within the budget, and a model left as it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import DataError, SpecError
from slimtune.core.state import state_of
from slimtune.initialise.eva import absorb, shares
from slimtune.testing.cases import case
from slimtune.testing.zoo import gpt2, llama, t5

DATA_INITS = ["eva", "corda", "corda_kpm", "lora_ga"]


def batches(n: int = 3, rows: int = 4, labels: bool = True) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        ids = torch.randint(3, 99, (rows, 24), generator=g)
        mask = torch.ones_like(ids)
        mask[-1, 18:] = 0
        wanted = ids.masked_fill(mask == 0, -100)
        wanted[:, :6] = -100
        out.append({"input_ids": ids, "attention_mask": mask} | ({"labels": wanted} if labels else {}))
    return out


def ops(model: nn.Module, name: str = "default") -> dict[str, Any]:
    return {path: op for (path, _), op in state_of(model).adapters[name].ops.items()}


def inputs_of(model: nn.Module, path: str, data: list[dict[str, Tensor]], only_labelled: bool) -> Tensor:
    """Return the rows [n, a] that a module reads, in float64, by a hook of the test's own."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    rows = []
    with torch.no_grad():
        for batch in data:
            model(**batch)
            keep = batch["attention_mask"].bool() & ((batch["labels"] != -100) if only_labelled else True)
            rows.append(seen.pop()[keep])
    handle.remove()
    return torch.cat(rows).double()


def smallest_cosine(A: Tensor, B: Tensor) -> float:
    """Return the cosine of the largest angle between the spans of two sets of rows."""
    return float(torch.linalg.svdvals(torch.linalg.qr(A.double().T)[0].T @ torch.linalg.qr(B.double().T)[0]).min())


# ---- what they find ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "target"), [(llama, "up_proj"), (gpt2, "c_attn")])
def test_eva_takes_the_principal_directions(make: Any, target: str) -> None:
    model = make()
    st.attach(model, st.LoRA(r=4, init="eva", rho=1.0, targets=target), data=batches())
    for path, op in ops(model).items():
        X = inputs_of(make(), path, batches(), only_labelled=True)
        _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        assert S[3] > 1.01 * S[4], "the fourth direction is not well defined, so the comparison would mean nothing"
        assert smallest_cosine(op.A.detach(), V[:4]) > 0.99  # of 32 directions 16 are kept from batch to batch
        torch.testing.assert_close(op.A @ op.A.T, torch.eye(4), atol=1e-5, rtol=0)
        assert not op.B.any()
        assert op.A0 is None


def test_padding_counts_on_neither_side_of_an_encoder_decoder() -> None:
    """Rows that are padded, with rubbish under the mask, give the directions of the same rows one at a time; cross-attention included."""
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randint(3, 99, (1, n), generator=g), torch.randint(3, 99, (1, m), generator=g)) for n, m in ((20, 7), (12, 16), (16, 12), (9, 10))]
    alone = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": wanted} for ids, wanted in rows]
    ids, mask, labels = torch.randint(3, 99, (4, 20), generator=g), torch.zeros(4, 20, dtype=torch.long), torch.full((4, 16), -100)
    for i, (own, wanted) in enumerate(rows):
        ids[i, : own.shape[1]], mask[i, : own.shape[1]], labels[i, : wanted.shape[1]] = own[0], 1, wanted[0]
    together = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    found = []
    for data in (alone, together):
        model = t5()
        st.attach(model, st.LoRA(r=3, init="eva", rho=1.0, targets=("q", "k", "v", "wi*")), data=data)
        found.append({path: op.A.detach() for path, op in ops(model).items()})
    assert any("EncDecAttention.k" in path for path in found[0])
    for path, A in found[0].items():
        assert smallest_cosine(A, found[1][path]) > 0.99, path


def test_incremental_svd_is_exact_while_nothing_is_cut_off() -> None:
    X = torch.randn(90, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(3, 0.1, 12)) + 5
    known = None
    for part in X.split([20, 1, 40, 29]):
        known = absorb(known, part, 12)
    assert known is not None
    V, explained = known.components(12)
    centred = X.double() - X.double().mean(0)
    _, S, want = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((V.double() * want).sum(1).abs(), torch.ones(12, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(explained.double(), S.square() / centred.square().sum(), atol=1e-5, rtol=1e-4)


def test_ranks_go_where_they_explain_most() -> None:
    assert shares([torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.4, 0.05, 0.01]), torch.tensor([0.02, 0.01, 0.0])], 4) == [3, 1, 0]
    model = llama()
    report = st.attach(model, st.LoRA(r=4, init="eva", rho=2.0), data=batches())
    found = ops(model)
    assert sum(op.r for op in found.values()) == 4 * 21
    assert len({op.r for op in found.values()}) > 1
    assert max(op.r for op in found.values()) <= 8
    assert {op.scale for op in found.values()} == {2.0}
    assert len(report.rows) == len(found)


def test_eva_leaves_out_what_gets_no_rank() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=1, init="eva", rho=6.0), data=batches())
    found = ops(model)
    assert 0 < len(found) < 21
    assert sum(op.r for op in found.values()) == 21


@pytest.mark.parametrize(("init", "pick"), [("corda", slice(None, 4)), ("corda_kpm", slice(-4, None))])
def test_corda_is_its_formula(init: str, pick: slice) -> None:
    model = llama()
    st.attach(model, st.LoRA(r=4, alpha=6, init=init, targets=("q_proj", "down_proj")), data=batches())
    for path, op in ops(model).items():
        plain = llama()
        X, W = inputs_of(plain, path, batches(), only_labelled=False), plain.get_submodule(path).weight.detach().double()
        C = X.T @ X / len(X)
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        U, S, V = torch.linalg.svd(W @ C, full_matrices=False)
        want = U[:, pick] * S[pick] @ V[pick] @ torch.linalg.inv(C)
        torch.testing.assert_close((op.scale * op.B @ op.A).double(), want, atol=2e-5, rtol=1e-3)
        assert torch.equal(op.A, op.A0)


def test_lora_ga_takes_the_gradients_directions() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=4, init="lora_ga", targets=("v_proj", "down_proj")), data=batches())
    plain = llama()
    for batch in batches():
        plain(**batch).loss.backward()
    for path, op in ops(model).items():
        G = plain.get_submodule(path).weight.grad
        U, _, V = torch.linalg.svd(G)
        assert smallest_cosine(op.A.detach(), V[:4]) > 0.9999
        assert smallest_cosine(op.B.detach().T, U[:, 4:8].T) > 0.999
        size = G.shape[0] ** 0.25 / 4  # b^(1/4) / sqrt(16)
        torch.testing.assert_close(op.A @ op.A.T, size**2 * torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(op.B.T @ op.B, size**2 * torch.eye(4), atol=1e-5, rtol=0)


# ---- what they leave behind -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", DATA_INITS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_start_is_the_base_and_everything_is_as_it_was(init: str, make: Any) -> None:
    model = make()
    base = model(**batches(1)[0]).logits
    bare = make()
    st.attach(bare, st.LoRA(r=4))
    hooks = {n: len(m._forward_hooks) for n, m in bare.named_modules()}
    model.train()
    next(model.children()).eval()
    modes = {n: m.training for n, m in model.named_modules()}
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    st.attach(model, st.LoRA(r=4, init=init), data=batches())
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in model.named_modules() if ".slim" not in f".{n}"} == modes
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert not any(p.grad is not None for p in list(model.parameters())[1:])
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    torch.testing.assert_close(model.eval()(**batches(1)[0]).logits, base, atol=2e-6, rtol=0)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 100:
            raise RuntimeError("too hot")
        return self.second(torch.tanh(self.first(x))).square().mean()


@pytest.mark.parametrize("init", DATA_INITS)
def test_an_error_while_looking_leaves_nothing_behind(init: str) -> None:
    model = Breaks().train()
    with pytest.raises(DataError, match="too hot"):
        st.attach(model, st.LoRA(r=2, init=init), data=[torch.randn(5, 8), torch.full((5, 8), 101.0)])
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert "slim_state" not in model.__dict__
    st.attach(model, st.LoRA(r=2, init=init), data=[torch.randn(50, 8)])


def test_other_adapters_are_not_seen() -> None:
    plain, busy = llama(), llama()
    st.attach(plain, st.LoRA(r=4, init="corda"), name="new", data=batches())
    st.attach(busy, st.LoRA(r=4), name="old")
    with torch.no_grad():
        for op in ops(busy, "old").values():
            op.B.normal_()
    st.attach(busy, st.LoRA(r=4, init="corda"), name="new", data=batches())
    for path, op in ops(plain, "new").items():
        torch.testing.assert_close(ops(busy, "new")[path].A, op.A)


@pytest.mark.parametrize("init", DATA_INITS)
@pytest.mark.parametrize("where", ["nf4", "group 4-bit", "linear, no bias"])
def test_they_work_on_quantised_bases_and_plain_modules(init: str, where: str) -> None:
    model = case(where).build(torch.float32)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) - 1).square().mean()

    whole = Loss()
    st.attach(whole, st.LoRA(r=4, init=init), data=[torch.randn(64, 64) for _ in range(2)])
    (op,) = ops(whole).values()
    assert op.A.abs().max() > 0


def test_dora_passes_the_data_on() -> None:
    model = llama()
    base = model(**batches(1)[0]).logits
    st.attach(model, st.DoRA(of=st.LoRA(r=4, init="eva", rho=1.0)), data=batches())
    torch.testing.assert_close(model(**batches(1)[0]).logits, base, atol=2e-6, rtol=0)
    plain = llama()
    st.attach(plain, st.LoRA(r=4, init="eva", rho=1.0), data=batches())
    assert torch.equal(ops(model)["model.layers.1.mlp.up_proj"].inner.A, ops(plain)["model.layers.1.mlp.up_proj"].A)


def test_files_and_memory_without_data(tmp_path: Any) -> None:
    """A file of such an adapter loads without data, the same bits."""
    model = llama()
    st.attach(model, st.LoRA(r=4, init="eva"), data=batches())
    with torch.no_grad():
        for op in ops(model).values():
            op.B.normal_()
    out = model(**batches(1)[0]).logits
    st.save(model, tmp_path)
    other = llama()
    st.load(other, tmp_path)
    torch.testing.assert_close(other(**batches(1)[0]).logits, out)


# ---- what they refuse -------------------------------------------------------------------------------------------------
def test_refusals() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (st.LoRA(init="eva"), None, "none was given"),
        (st.LoRA(), batches(), "does not start from data"),
        (st.LoRA(init="corda"), [], "no batches"),
        (st.LoRA(init="corda"), [{"nope": 1}], "does not take this batch"),
        (st.LoRA(init="lora_ga"), batches(labels=False), "from a loss"),
        (st.LoRA(r=16, init="eva"), batches(1, rows=1), "EVA needs"),
        (st.LoRA(r=20, init="lora_ga"), batches(), "takes 40 directions"),
        (st.LoRA(init="eva", targets="embed_tokens"), batches(), "which an embedding is not"),
    ]
    for spec, data, words in cases:
        model = llama()
        with pytest.raises((SpecError, DataError), match=words) as caught:
            st.attach(model, spec, data=data)
        assert caught.value.hint
        assert "slim_state" not in model.__dict__


def test_a_module_that_the_batches_miss_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(DataError, match="reach 1 of 2 modules") as caught:
        st.attach(Idle(), st.LoRA(r=2, init="eva"), data=[torch.randn(20, 8)])
    assert "idle" in caught.value.where


def test_no_more_batches_than_asked_for() -> None:
    def endless() -> Any:
        while True:
            yield torch.randn(20, 8)

    model = nn.Sequential(nn.Linear(8, 8))
    st.attach(model, st.LoRA(r=2, init="eva", init_batches=3), data=endless())


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    st.attach(nn.Sequential(nn.Linear(8, 8)), st.LoRA(r=2, init="eva"), data=[torch.randn(20, 8)] * 2)
    assert "batch 2 of 2" in capsys.readouterr().err
