"""Plans: reading them, grouping rows, nested blocks, threads and tasks."""

import asyncio
import threading

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import MergeError, NoSuchAdapter, PlanError, SiteError, SpecError
from slimtune.core.plan import Plan, parse
from slimtune.testing import zoo as tiny

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]])


def adapted(*names: str, model: nn.Module | None = None, targets: object = "all-linear") -> nn.Module:
    model = model if model is not None else tiny.llama()
    for i, name in enumerate(names):
        st.attach(model, st.LoRA(r=2, targets=targets), name=name)
        torch.manual_seed(i)
        for p in model.slim_state.adapters[name].parameters():
            nn.init.normal_(p, std=0.2)
    return model


def names(which: object) -> list[list[tuple[str, float | None]]]:
    return [[(n, None if w is None else round(w.item(), 6)) for n, w in link] for link in parse(which)]


def test_parse() -> None:
    assert names(None) == []
    assert names("a") == [[("a", None)]]
    assert names(["a", "b"]) == [[("a", None)], [("b", None)]]
    assert names({"a": 0.7, "b": 1}) == [[("a", 0.7), ("b", 1.0)]]
    assert names(["a", {"b": 0.5, "c": -2}]) == [[("a", None)], [("b", 0.5), ("c", -2.0)]]
    assert names([]) == names({}) == []
    assert names(("a",)) == names("a")


@pytest.mark.parametrize("bad", [3, 1.5, {"a"}, {"a": "b"}, {"a": None}, {1: 0.5}, {"a": True}, ["a", "a"], ["a", {"a": 0.5}], [3], b"a", object()])
def test_what_cannot_be_read(bad: object) -> None:
    with pytest.raises(PlanError) as error:
        Plan.of(bad)
    assert error.value.hint


@pytest.mark.parametrize("bad", ["a", {"a": 1.0}, [], 3, None])
def test_rows_that_cannot_be_read(bad: object) -> None:
    with pytest.raises(PlanError, match="rows="):
        Plan.of_rows(bad)


def test_rows_with_the_same_plan_share_a_segment() -> None:
    plan = Plan.of_rows(["a", None, "a", {"b": 0.5}, {"b": 0.5}, ["a", "b"], "a"])
    assert [rows for rows, _ in plan.segments] == [[0, 2, 6], [1], [3, 4], [5]]
    assert plan.size == 7
    assert plan.names == {"a", "b"}


def test_contiguous_rows_are_slices() -> None:
    plan = Plan.of_rows(["a", "a", "b", None, "b"])
    first, second, third = plan.selectors(5, torch.device("cpu"), "p", "k")
    assert (first, third) == (slice(0, 2), slice(3, 4))
    assert second.tolist() == [2, 4]
    with pytest.raises(PlanError, match="5 rows, but this module got 10") as error:
        plan.selectors(10, torch.device("cpu"), "p", "k")
    assert "p" in error.value.where
    wide = plan.expanded().selectors(10, torch.device("cpu"), "p", "k")
    assert wide[0] == slice(0, 4)
    assert wide[1].tolist() == [4, 5, 8, 9]
    with pytest.raises(PlanError):
        plan.expanded().selectors(11, torch.device("cpu"), "p", "k")


def test_statement_or_block() -> None:
    model = adapted("a", "b")
    out = {}
    for which in ("a", "b", None):
        st.use(model, which)
        out[which] = model(IDS).logits
    st.use(model, "a")
    with st.use(model, "b"):
        assert torch.equal(model(IDS).logits, out["b"])
    assert torch.equal(model(IDS).logits, out["a"]), "the block must not outlive itself"
    kept = st.use(model, "b")
    assert torch.equal(model(IDS).logits, out["b"]), "a statement holds from now on, also when its value is kept"
    st.use(model, None)
    assert torch.equal(model(IDS).logits, out[None])
    with kept:
        assert torch.equal(model(IDS).logits, out["b"]), "it may become a block later"
    assert torch.equal(model(IDS).logits, out[None])
    for _ in range(100):
        st.use(model, "a")
    assert len(model.slim_state._defaults) < 5, "statements must not pile up"


def test_gradients_follow_statements_not_blocks() -> None:
    model = adapted("a", "b")

    def live() -> set[str]:
        return {n for n, a in model.slim_state.adapters.items() if all(p.requires_grad for p in a.parameters())}

    st.use(model, "a")
    assert live() == {"a"}
    with st.use(model, "b"):
        assert live() == {"a"}
    st.use(model, {"a": 0.5, "b": 0.5})
    assert live() == {"a", "b"}
    st.use(model, None)
    assert live() == set()
    st.trainable(model, "b")
    assert live() == {"b"}
    st.trainable(model, ["a", "b"])
    assert live() == {"a", "b"}
    with st.use(model, rows=["a", None, "b", "a"]):
        assert live() == {"a", "b"}
        model(IDS).logits.square().mean().backward()
    assert all(p.grad is not None for n in "ab" for p in model.slim_state.adapters[n].parameters())


def test_errors() -> None:
    model = adapted("a")
    with pytest.raises(NoSuchAdapter, match="'aa'") as error:
        st.use(model, "aa")
    assert "attached: a" in error.value.where
    with pytest.raises(SpecError, match="not both"):
        st.use(model, "a", rows=["a"])
    with pytest.raises(NoSuchAdapter):
        st.trainable(model, ["a", "z"])
    with pytest.raises(NoSuchAdapter):
        st.detach(model, "z")
    with pytest.raises(NoSuchAdapter):
        st.report(model, "z")
    with pytest.raises(SiteError, match="nothing is attached"):
        st.use(tiny.llama(), "a")
    with pytest.raises(SiteError, match="sit on a part"):
        st.use(nn.ModuleDict({"inner": model}), "a")
    with pytest.raises(SiteError, match="carries adapters already"):
        st.attach(nn.ModuleDict({"inner": model}), st.LoRA())
    with st.use(model, "a"), pytest.raises(MergeError, match="block is open"):
        st.merge(model)
    with st.use(model, rows=["a", None]), pytest.raises(MergeError, match="differs by row"):
        st.merge(model)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a.b", "-a", "a b", "x" * 101, None, 3, "é", "a\n"])
def test_names_that_cannot_be(name: object) -> None:
    model = tiny.llama()
    with pytest.raises(st.SlimtuneError, match="cannot name an adapter"):
        st.attach(model, st.LoRA(), name=name)
    assert "slim_state" not in model.__dict__


def test_threads() -> None:
    """Eight threads, each with a block of its own, while the default flips: every output is right."""
    model = adapted("a", "b")
    plans = ["a", "b", None, ["a", "b"], {"a": 0.5, "b": 0.5}, {"b": -1.0}, "a", None]
    want = []
    with torch.no_grad():
        for plan in plans:
            with st.use(model, plan):
                want.append(model(IDS).logits)
    wrong: list[str] = []
    stop = threading.Event()

    def serve(i: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                with st.use(model, plans[i]):
                    got = model(IDS).logits
                    with st.use(model, rows=[plans[i], None, "a", "b"]):
                        row = model(IDS).logits[0]
                if not torch.allclose(got, want[i], atol=1e-5) or not torch.allclose(row, want[i][0], atol=1e-5):
                    wrong.append(f"thread {i}")

    def flip() -> None:
        while not stop.wait(0.0005):  # without a pause it would starve the others of the interpreter's lock
            st.use(model, "a")
            st.use(model, None)

    flipper = threading.Thread(target=flip)
    flipper.start()
    workers = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    stop.set()
    flipper.join()
    assert not wrong
    st.use(model, "b")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, want[1], atol=1e-5), "the default after all that"


def test_a_block_is_not_seen_by_a_thread_without_one() -> None:
    model = adapted("a")
    st.use(model, None)
    base = model(IDS).logits
    seen = []
    with st.use(model, "a"):
        worker = threading.Thread(target=lambda: seen.append(model(IDS).logits))
        worker.start()
        worker.join()
    assert torch.equal(seen[0], base)


def test_tasks() -> None:
    model = adapted("a", "b")
    want = {}
    for plan in ("a", "b", None):
        with st.use(model, plan):
            want[plan] = model(IDS).logits

    async def serve(plan: str | None) -> None:
        for _ in range(5):
            with st.use(model, plan):
                await asyncio.sleep(0)
                assert torch.equal(model(IDS).logits, want[plan])
                await asyncio.sleep(0)
                assert torch.equal(model(IDS).logits, want[plan])

    async def everyone() -> None:
        await asyncio.gather(*(serve(p) for p in ("a", "b", None, "a", "b")))

    asyncio.run(everyone())


# ---- generate ---------------------------------------------------------------------------------------------------------
def prompts(kind: str) -> dict[str, torch.Tensor]:
    if kind == "whisper":
        torch.manual_seed(5)
        return {"input_features": torch.randn(4, 8, 40)}
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "whisper"])
@pytest.mark.parametrize(
    "how",
    [
        {}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "beams-2", "beams-penalty", "no-cache"],
)  # fmt: skip
def test_generate_rows_equal_each_row_alone(kind: str, how: dict[str, object]) -> None:
    model = adapted("a", "b", model=getattr(tiny, kind)())
    plan = ["a", None, {"a": 0.5, "b": 0.5}, "b"]
    inputs = prompts(kind)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False} | how
    with st.use(model, rows=plan):
        mixed = model.generate(**inputs, **options)
    k = int(how.get("num_return_sequences", 1))
    different = set()
    for i, which in enumerate(plan):
        with st.use(model, which):
            alone = model.generate(**{n: t[i : i + 1] for n, t in inputs.items()}, **options)
        part = mixed[i * k : (i + 1) * k]
        width = min(part.shape[1], alone.shape[1])
        assert torch.equal(part[:, :width], alone[:, :width]), f"row {i}"
        different.add(str(alone[:, -5:].tolist()))
    assert len(different) > 1, "the adapters must make a difference here"


def test_generate_samples_several_sequences() -> None:
    model = adapted("a", "b", model=tiny.gpt2())
    with st.use(model, rows=["a", None, "b", "a"]):
        out = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert out.shape == (12, 7)


@pytest.mark.parametrize("tokens", [4, 1])
def test_flattened_rows(tokens: int) -> None:
    """Experts see tokens, not rows, and still each row gets its own adapter."""
    model = adapted("a", "b", model=tiny.mixtral(), targets=("experts", "q"))
    plan = ["a", None, "b", "a"]
    with torch.no_grad(), st.use(model, rows=plan):
        mixed = model(IDS[:, :tokens]).logits
    for i, which in enumerate(plan):
        with torch.no_grad(), st.use(model, which):
            assert torch.allclose(model(IDS[i : i + 1, :tokens]).logits, mixed[i : i + 1], atol=1e-5)


def test_one_row_of_several_tokens_is_not_taken_for_rows() -> None:
    """4 planned rows but a batch of 1 x 4 tokens: the experts see 4 tokens and they must not be treated as 4 rows."""
    model = adapted("a", "b", model=tiny.mixtral(), targets=("experts",))
    with torch.no_grad(), st.use(model, rows=["a", None, "b", "a"]), pytest.raises(PlanError):
        model(IDS[:1])


# ---- images -------------------------------------------------------------------------------------------------------------
def pictures(counts: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch whose rows hold so many images each."""
    torch.manual_seed(6)
    ids = torch.randint(3, 90, (len(counts), 12))
    for row, n in zip(ids, counts, strict=True):
        row[: 4 * n] = tiny.IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(sum(counts), 3, 16, 16)}


def test_an_image_is_never_given_to_the_wrong_row() -> None:
    """Two images in two rows are not one for each row."""
    model = adapted("a", "b", model=tiny.llava())
    with st.use(model, rows=["a", "b"]):
        model(**pictures([1, 1]))
        for counts in ([2, 0], [0, 2]):
            with pytest.raises(PlanError, match="different numbers of images") as error:
                model(**pictures(counts))
            assert "vision_tower" in error.value.where
            assert "language_model" in error.value.hint
    with st.use(model, "a"):
        model(**pictures([2, 0]))
    text = adapted("a", "b", model=tiny.llava(), targets="re:model.language_model.*_proj")
    batch = pictures([2, 0])
    with torch.no_grad():
        with st.use(text, rows=["a", "b"]):
            mixed = text(**batch).logits
        for i, name in enumerate("ab"):
            with st.use(text, name):
                assert torch.allclose(text(**batch).logits[i], mixed[i], atol=1e-5)
