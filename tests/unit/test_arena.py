"""The arena on a tiny model: every cell measured once, the work goes on where it was stopped, and its page says what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import bert, jsonl, reviews

from slimtune.arena.contenders import REFERENCE, SEEDS, Contender, contenders, spec_of
from slimtune.arena.page import write
from slimtune.arena.run import Limits, best_rate, results, run
from slimtune.arena.store import Store
from slimtune.arena.tasks import TASKS, Task
from slimtune.core.errors import FileError
from slimtune.testing import zoo


@pytest.fixture
def task(tmp_path: Path) -> Task:
    data = {name: str(jsonl(tmp_path / f"{name}.jsonl", reviews(n))) for name, n in (("train", 24), ("test", 8))}
    settings = {"model": str(bert(tmp_path / "bert")), "task": "classification", "train_file": data["train"], "test_file": data["test"]}
    return Task("minilm-reviews", "A tiny one", settings, steps=2, batch=4, valid=4, test=8, methods=("lora", "bitfit"), reference=("lora",))


def cell(name: str, lr: float, seed: int, score: float, library: str = "slimtune", **more: Any) -> dict[str, Any]:
    kind = "seed" if seed else "trial"
    head = {"task": "minilm-reviews", "kind": kind, "library": library, "name": name, "lr": lr, "seed": seed, "took": 1.0}
    return {**head, "trainable": 10, "bytes": 5, "valid": score, "score": score, **more}


def test_runs_every_cell_once_and_goes_on_where_it_stopped(task: Task, tmp_path: Path) -> None:
    store, said = Store(tmp_path / "results.jsonl"), list[str]()
    run([task], store, Limits(only=("lora", "majority")), said.append)
    ours = [c for c in store.cells.values() if c["library"] == "slimtune"]
    assert sorted(c["kind"] for c in ours) == ["cost", "seed", "seed", "trial", "trial", "trial"]
    assert len({c["lr"] for c in ours if c["kind"] == "trial"}) == 3
    seeds = {c["lr"] for c in ours if c["kind"] != "trial"}
    assert seeds == {best_rate(task, Contender("lora"), store)}, "the seeds and the cost are of the best rate"
    assert {c["name"] for c in store.cells.values() if c["library"] == "peft"} == {"lora"}
    assert all(0 <= c["score"] <= 1 and c["trainable"] > 0 and c["bytes"] > 0 for c in ours if c["kind"] != "cost")

    lines = store.path.read_text().splitlines(keepends=True)
    store.path.write_text("".join(lines[:-2]) + lines[-2][:20])  # a kill in the middle of a line
    again = Store(store.path)
    assert len(again.cells) == len(lines) - 2
    measured = list[str]()
    run([task], again, Limits(only=("lora", "majority")), measured.append)
    assert len(measured) == 2
    assert set(again.cells) == set(store.cells)
    run([task], again, Limits(only=("lora", "majority")), said.append)
    assert said[-1].endswith("all there")


def test_an_unreadable_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"task": 1}\n' + json.dumps(cell("lora", 0.1, 0, 0.5)) + "\n")
    with pytest.raises(FileError, match="line 1"):
        Store(path)


def test_the_page_orders_explains_and_names_who_is_no_better_than_a_head(tmp_path: Path) -> None:
    store, task = Store(tmp_path / "results.jsonl"), TASKS[0]
    rates = Contender("lora").rates
    for i, lr in enumerate(rates):
        store.add(cell("lora", lr, 0, 0.7 + 0.1 * (i == 1), forgetting=0.25))
        store.add(cell("bitfit", Contender("bitfit").rates[i], 0, 0.6))
    for seed in SEEDS[1:]:
        store.add(cell("lora", rates[1], seed, 0.8 + 0.02 * seed, forgetting=0.25))
    store.add(cell("probe", 0.0, 0, 0.65, library="", trainable=0))
    store.add({k: v for k, v in cell("qa_lora", Contender("qa_lora").rates[0], 0, 0).items() if k != "score"} | {"refused": "it needs a 4-bit base"})
    (tmp_path / "notes.md").write_text("A word about it.\n")
    rows = {r["who"]: r for r in results(task, store)}
    assert rows["lora"]["score"] == pytest.approx((0.8 + 0.82 + 0.84) / 3)
    assert rows["lora"]["spread"] == pytest.approx(0.02)
    files = write(store, tmp_path / "page")
    assert all(f.is_file() and f.stat().st_size for f in files)
    assert "A word" not in files[0].read_text()
    text = write(store, tmp_path)[0].read_text()
    assert text.index("| lora | 0.820 | 0.020 (3 seeds)") < text.index("| probe | 0.650")
    assert "No better than probe (0.650): bitfit." in text
    assert "qa_lora takes no part: it needs a 4-bit base" in text
    assert "A word about it." in text


def test_everybody_gets_the_same_search() -> None:
    for task in TASKS:
        who = contenders(task)
        assert len({str(c) for c in who}) == len(who)
        assert {len(c.rates) for c in who if c.library != ""} == {3}
        assert any(c.name == "full" for c in who)


def test_every_twin_in_the_reference_library_can_be_made() -> None:
    """A mistake of ours in its settings would stand in the table as the reference's refusal."""
    for name, make in REFERENCE.items():
        assert make(spec_of(name, TASKS[0], 200), 200, zoo.bert()).peft_type, name
