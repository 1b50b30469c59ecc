"""Steps that take turns, each contestant in a process of its own: what one library leaves behind in the memory allocator must not slow the other.

In one process it does: a step of the reference library in float32 takes 4.0 s alone, and 3.7 s to 5.1 s beside other models, whose freed
tensors decide whether its own come from the operating system, page by page. A process that has waited for its turn may have lost pages as
well, so each turn is a step that is not timed, and one that is.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from slimtune.savers.heap import keep_freed

Step = Callable[[], float]
Make = Callable[..., tuple[Step, dict[str, Any]]]


def take_turns(contestants: dict[str, tuple[Make, dict[str, Any]]], repeats: int) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Return seconds of every step, one contestant after the other and each round in another order, and what each says of itself.

    Args:
        contestants: name -> (a function of a module, its arguments); it returns a step, and facts that were counted before any step.
        repeats: rounds.
    """
    spawn = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, (make, options) in contestants.items():
        here, there = spawn.Pipe()
        spawn.Process(target=_serve, args=(there, make, options), daemon=True).start()
        there.close()
        lines[name], facts[name] = here, here.recv()  # one after the other: they do not get ready at the same time
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            lines[name].send(True)
            seconds[name].append(lines[name].recv())
    for line in lines.values():
        line.send(False)
    return seconds, facts


def _serve(line: Connection, make: Make, options: dict[str, Any]) -> None:
    keep_freed()  # st.lean does so for ours; here for all, so that it favours nobody
    step, facts = make(**options)
    step()  # warm-up
    line.send(facts)
    while line.recv():
        step()
        start = time.perf_counter()
        step()
        line.send(time.perf_counter() - start)
