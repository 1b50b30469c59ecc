"""Methods that act at optimiser steps: `slimtune train` runs their schedules, and a resumed run ends with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from slimtune.cli import train as command
from slimtune.train.runs import read_json

STEPS = 16
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"method": "adalora", "init_r": 6, "target_r": 3, "delta_t": 2},
    "delta_lora": {"method": "delta_lora", "r": 4, "start": 7},
    "progressive": {"method": "progressive", "r": 2, "by": 2, "max_r": 6, "every": 4, "shrink_at": 11, "energy": 0.9},
    "by the loss": {"method": "progressive", "r": 2, "by": 1, "max_r": 6, "every": 0, "patience": 2, "lr": 1e-5},
}


def adapter_files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "adapter").iterdir())}


def interrupted(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed just after a checkpoint."""
    shutil.copytree(run, to)
    for p in to.iterdir():
        if p.name not in {"checkpoints", "recipe.yaml", "metrics.jsonl", "environment.json", "before.json"}:
            shutil.rmtree(p) if p.is_dir() else p.unlink()
    for p in (to / "checkpoints").iterdir():
        if int(p.name.removeprefix("step-")) > step:
            shutil.rmtree(p)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    tiny.llama(tmp_path / "model")
    tiny.reviews(tmp_path / "data")
    options = {"max_steps": STEPS, "save_every": 5, "schedule": "cosine", "batch_size": 4, "accumulate": 2, **METHODS[name]}
    if name == "adalora":
        options |= {"r": None}
    recipe = tiny.recipe(tmp_path / "whole", model=tmp_path / "model", data=tmp_path / "data", name="a", out="run", **options)
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(keepends=True) if "None" not in line))
    command.run(str(recipe), [], resume=False)
    run = recipe.parent / "run"
    kept = sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    results = read_json(run / "results.json")
    if name == "adalora":
        ranks = results["adapter"]["ranks"]
        assert sum(ranks.values()) == 3 * len(ranks)
        assert len(set(ranks.values())) > 1
        assert "Where the rank went" in (run / "report.html").read_text()
        assert (run / "figures" / "ranks.png").is_file()
    if name == "by the loss":
        assert min(results["adapter"]["ranks"].values()) > 2
    first = kept[0]
    assert first < STEPS
    again = tmp_path / "again"
    again.mkdir()
    interrupted(run, again / "run", first)
    (again / "recipe.yaml").write_text(recipe.read_text())
    command.run(str(again / "recipe.yaml"), [], resume=True)
    assert adapter_files(again / "run") == adapter_files(run)
