"""A block's plan holds where the block is: generators that take turns, pools that close them, threads that stream, rows before they expand."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.testing import zoo

IDS = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        st.attach(model, st.LoRA(r=2), name=name)
        with torch.no_grad():
            for p in st.adapters(model)[name].parameters():
                p.normal_()
    st.use(model, None)
    return model.eval()


X = torch.ones(1, 4)


def outputs(model: nn.Module) -> dict[str | None, torch.Tensor]:
    found: dict[str | None, torch.Tensor] = {}
    for which in ("a", "b", None):
        with st.use(model, which):
            found[which] = model(X).detach()
    assert not torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], found[None])
    return found


def stream(model: nn.Module, which: str, n: int = 3) -> Iterator[torch.Tensor]:
    with st.use(model, which):
        for _ in range(n):
            yield model(X).detach()


def test_generators_that_take_turns_each_see_their_own() -> None:
    model = net()
    want = outputs(model)
    for order in ("ababab", "aabbab", "abbbaa"):
        turns = {"a": stream(model, "a"), "b": stream(model, "b")}
        for which in order:
            assert torch.equal(next(turns[which]), want[which]), order
        for which in "ab":
            assert list(turns[which]) == []
        assert torch.equal(model(X), want[None]), "nothing is left behind"


def test_a_block_inside_a_generator_and_one_inside_of_what_it_calls() -> None:
    model = net()
    want = outputs(model)

    def inner() -> torch.Tensor:
        with st.use(model, "b"):
            return model(X).detach()

    def outer() -> Iterator[torch.Tensor]:
        with st.use(model, "a"):
            yield model(X).detach()
            yield inner()
            with st.use(model, None):
                yield model(X).detach()
            yield model(X).detach()

    got = []
    for value in outer():
        got.append(value)
        with st.use(model, "b"):
            assert torch.equal(model(X), want["b"])
    assert [[k for k, v in want.items() if torch.equal(v, g)] for g in got] == [["a"], ["b"], [None], ["a"]]


def test_a_context_manager_made_of_a_generator_covers_its_block() -> None:
    model = net()
    want = outputs(model)

    @contextlib.contextmanager
    def serving(which: str) -> Iterator[None]:
        with st.use(model, which):
            yield

    def generator() -> Iterator[torch.Tensor]:
        with st.use(model, "b"):
            with serving("a"):
                yield model(X).detach()
            yield model(X).detach()

    with serving("a"):
        assert torch.equal(model(X), want["a"])
        with serving("b"):
            assert torch.equal(model(X), want["b"])
        assert torch.equal(model(X), want["a"])
    assert torch.equal(model(X), want[None])
    first, second = generator()
    assert torch.equal(first, want["a"])
    assert torch.equal(second, want["b"])


def test_each_step_of_a_generator_may_run_in_another_context_and_thread() -> None:
    """Web frameworks pull the values of a plain generator in a pool, every one in a copy of the context."""
    model = net()
    want = outputs(model)
    turns = stream(model, "a", 2)
    got: list[Any] = []

    def pull() -> None:
        try:
            got.append(next(turns, "end"))
        except BaseException as error:
            got.append(error)

    for _ in range(3):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(pull,))
        thread.start()
        thread.join()
    assert torch.equal(got[0], want["a"])
    assert torch.equal(got[1], want["a"])
    assert got[2] == "end", got[2]
    assert torch.equal(model(X), want[None])
    half = stream(model, "b", 5)
    next(half)
    thread = threading.Thread(target=half.close)
    thread.start()
    thread.join()
    assert torch.equal(model(X), want[None]), "closed elsewhere, gone here"
    with st.use(model, "a"):
        assert torch.equal(model(X), want["a"])


def test_tasks_may_be_closed_in_another_context() -> None:
    model = net()

    def steps() -> Iterator[int]:
        with st.tasks(model, 0):
            yield 1

    running = steps()
    contextvars.copy_context().run(next, running)
    running.close()


def test_asynchronous_tasks_and_generators() -> None:
    model = net()
    want = outputs(model)

    async def task(which: str) -> bool:
        with st.use(model, which):
            await asyncio.sleep(0)
            return torch.equal(model(X), want[which])

    async def values(which: str) -> Any:
        with st.use(model, which):
            for _ in range(2):
                yield torch.equal(model(X), want[which])

    async def main() -> list[bool]:
        done = list(await asyncio.gather(task("a"), task("b")))
        a, b = values("a"), values("b")
        for _ in range(2):
            done += [await anext(a), await anext(b)]
        return done

    assert asyncio.run(main()) == [True] * 6


def test_the_handle_carries_its_plan_into_threads() -> None:
    model = net()
    want = outputs(model)
    got: dict[str, Any] = {}

    def run(name: str, function: Any) -> None:
        thread = threading.Thread(target=lambda: got.__setitem__(name, function()))
        thread.start()
        thread.join()

    with st.use(model, "a") as a:
        run("handle", lambda: a(X))
        run("function", lambda: a.run(model.forward, X))
        run("thread's own", lambda: model(X))
        assert torch.equal(a(X), want["a"])
        with st.use(model, "b"):
            assert torch.equal(a(X), want["a"])
    assert torch.equal(got["handle"], want["a"])
    assert torch.equal(got["function"], want["a"])
    assert torch.equal(got["thread's own"], want[None])
    assert torch.equal(model(X), want[None])
    st.detach(model, "a")
    with pytest.raises(st.NoSuchAdapter):
        a(X)


def test_streaming_from_a_thread_writes_the_tokens_of_the_block() -> None:
    torch.manual_seed(0)
    model: Any = zoo.llama().eval()
    st.attach(model, st.LoRA(r=4), name="a")
    with torch.no_grad():
        for p in st.adapters(model)["a"].parameters():
            p.normal_(std=0.5)
    st.use(model, None)
    options = dict(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    bare = model.generate(**options)
    with st.use(model, "a") as a:
        want = model.generate(**options)
    assert not torch.equal(want, bare)
    got: list[torch.Tensor] = []
    with st.use(model, "a") as a:
        bound = model.generate
        threads = [threading.Thread(target=lambda f=f: got.append(f(**options))) for f in (bound, a.generate)]
        for thread in threads:
            thread.start()
            thread.join()
    assert all(torch.equal(g, want) for g in got)
    assert len(got) == 2
    assert torch.equal(model.generate(**options), bare)
    with st.use(model, None):
        assert torch.equal(bound(**options), bare), "the block that is open where it is called counts"


@pytest.mark.parametrize("how", ["ids", "keyword", "inputs", "embeddings"])
def test_generate_checks_rows_before_they_expand(how: str) -> None:
    model: Any = zoo.llama().eval()
    st.attach(model, st.LoRA(r=2), name="a")
    four = IDS.repeat(2, 1)
    given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "ids": ((four,), {}), "keyword": ((), {"input_ids": four}), "inputs": ((), {"inputs": four}),
        "embeddings": ((), {"inputs_embeds": model.get_input_embeddings()(four).detach()}),
    }  # fmt: skip
    args, kwargs = given[how]
    with st.use(model, rows=["a", None]), pytest.raises(st.PlanError, match="2 rows, but this module got 4"):
        model.generate(*args, **kwargs, max_new_tokens=2, pad_token_id=0)
    with st.use(model, rows=["a", None, None, "a"]):
        model.generate(*args, **kwargs, max_new_tokens=2, pad_token_id=0)
        model.generate(*args, **kwargs, max_new_tokens=2, pad_token_id=0, num_beams=2)
