"""The arena's order of work: for each contender the learning rates, then the seeds with the best one, then what a step costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.arena.contenders import SEEDS, Contender, contenders
from slimtune.arena.store import Store, code_version
from slimtune.arena.tasks import Task, load
from slimtune.core.errors import SlimtuneError

if TYPE_CHECKING:
    from slimtune.train.job import Job

Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """How much of the arena to run.

    Attributes:
        steps: optimiser steps of every run; None: the task's own.
        only: names of contenders; empty: all.
        seeds: how many seeds.
        parts: "scores", "costs" or both.
    """

    steps: int | None = None
    only: tuple[str, ...] = ()
    seeds: int = len(SEEDS)
    parts: tuple[str, ...] = ("scores", "costs")


def run(tasks: Iterable[Task], store: Store, limits: Limits, say: Say) -> None:
    """Measure every cell that the store does not hold yet.

    Args:
        tasks: which.
        store: what is known; every finished cell is written at once, so the work can be stopped and started again.
        limits: how much.
        say: receives one line a cell.

    Raises:
        SlimtuneError: a model or data cannot be loaded. A contender that cannot take part becomes a cell that says why.
    """
    version = code_version()
    for task in tasks:
        who = [c for c in contenders(task) if not limits.only or c.name in limits.only]
        if not any(True for c in who for _ in _missing(task, c, store, limits)):
            say(f"{task.name}: all there")
            continue
        with tempfile.TemporaryDirectory() as work:
            job = load(task, Path(work))
            for c in who:
                for kind, lr, seed in _missing(task, c, store, limits):
                    cell = _cell(job, task, c, kind, lr, seed, limits)
                    store.add({**cell, "version": version})
                    say(describe(cell))


def _missing(task: Task, c: Contender, store: Store, limits: Limits) -> Iterator[tuple[str, float, int]]:
    """Yield (kind, learning rate, seed) of what is not measured; the best rate is looked up when its trials are done."""
    if "scores" in limits.parts:
        for lr in c.rates:
            if (task.name, "trial", c.library, c.name, lr, 0) not in store:
                yield "trial", lr, 0
        best = best_rate(task, c, store)
        if best is None:
            return
        for seed in SEEDS[1 : limits.seeds] if len(c.rates) > 1 else ():  # the first seed's run is the trial itself
            if (task.name, "seed", c.library, c.name, best, seed) not in store:
                yield "seed", best, seed
    best = best_rate(task, c, store)
    if "costs" in limits.parts and len(c.rates) > 1 and best is not None and (task.name, "cost", c.library, c.name, best, 0) not in store:
        yield "cost", best, 0


def best_rate(task: Task, c: Contender, store: Store) -> float | None:
    """Return the learning rate with the best validation figure, None before all are tried or if the contender cannot take part."""
    cells = [store.cells.get((task.name, "trial", c.library, c.name, lr, 0)) for lr in c.rates]
    known = [x for x in cells if x is not None and "refused" not in x]
    if len(known) < len(c.rates):
        return None
    return float(max(known, key=lambda x: x["valid"])["lr"])


def _cell(job: Job, task: Task, c: Contender, kind: str, lr: float, seed: int, limits: Limits) -> dict[str, Any]:
    from slimtune.arena.cost import cost
    from slimtune.arena.fit import fit
    from slimtune.train.quiet import quiet

    head = {"task": task.name, "kind": kind, "library": c.library, "name": c.name, "lr": lr, "seed": seed}
    began = time.perf_counter()
    try:
        with quiet():
            if kind == "cost":
                found = cost(job, task, c, lr)
            else:
                found = fit(job, task, c, lr, seed, limits.steps or task.steps)
    except SlimtuneError as error:
        return {**head, "refused": f"{error.what}" + (f" ({error.where})" if error.where else "")}
    except Exception as error:
        if c.library != "peft":  # a defect of ours must not hide in a table
            raise
        return {**head, "refused": f"{type(error).__name__}: {str(error)[:200]}"}
    return {**head, **found, "took": round(time.perf_counter() - began, 1)}


def describe(cell: dict[str, Any]) -> str:
    """Return one line about a cell."""
    who = f"{cell['task']:>17}  {(cell['library'] + ' ' + cell['name']).strip():<28} {cell['kind']:<6} lr {cell['lr']:g} seed {cell['seed']}"
    if "refused" in cell:
        return f"{who}: {cell['refused']}"
    value = cell.get("score", cell.get("valid", cell.get("seconds")))
    return f"{who}: {value:.4f}  ({cell['took']:.0f} s)"


def results(task: Task, store: Store) -> list[dict[str, Any]]:
    """Return one row a contender: mean and spread of the score, and what it costs; refused ones with their reason."""
    import statistics

    rows = []
    for c in contenders(task):
        cells = [x for k, x in store.cells.items() if k[0] == task.name and (k[2], k[3]) == (c.library, c.name)]
        refused = next((x["refused"] for x in cells if "refused" in x), None)
        best = best_rate(task, c, store)
        scores = [x for x in cells if x["kind"] != "cost" and x["lr"] == best and "refused" not in x]
        if refused is None and not scores:
            continue
        row: dict[str, Any] = {"who": str(c), "name": c.name, "library": c.library, "refused": refused}
        if refused is None:
            values = [x["score"] for x in scores]
            price = next((x for x in cells if x["kind"] == "cost" and x["lr"] == best), {})
            row |= {
                "lr": best, "seeds": len(values), "score": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
                "trainable": scores[0]["trainable"], "bytes": scores[0]["bytes"],
                "seconds": price.get("seconds"), "peak_bytes": price.get("peak_bytes"),
                "forgetting": statistics.mean(x["forgetting"] for x in scores) if "forgetting" in scores[0] else None,
            }  # fmt: skip
        rows.append(row)
    return rows


def default_store(root: Path) -> Path:
    """Return where the arena keeps its cells below a folder."""
    return root / "results.jsonl"
