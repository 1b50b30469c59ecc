"""A run that was killed or stopped, and resumed, ends with the same bits as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from slimtune.cli import train as command
from slimtune.core.errors import RecipeError
from slimtune.train.report import read_metrics

SETTINGS = {
    "dropout": 0.1,
    "accumulate": 2,
    "batch_size": 4,
    "max_steps": 40,
    "save_every": 5,
    "eval_every": 7,
    "schedule": "cosine",
    "clip": 1.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    tiny.llama(root / "model")
    tiny.reviews(root / "data")
    tiny.recipe(root / "whole", model=root / "model", data=root / "data", name="a", out="run", **SETTINGS)
    command.run(str(root / "whole" / "recipe.yaml"), [], resume=False)
    return root


def recipe_in(world: Path, name: str) -> Path:
    return tiny.recipe(world / name, model=world / "model", data=world / "data", name="a", out="run", **SETTINGS)


def adapter_files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "adapter").iterdir())}


def train_in_background(recipe: Path, *more: str) -> subprocess.Popen[str]:
    code = "import sys; from slimtune.cli import train; train.run(sys.argv[1], [], resume='--resume' in sys.argv)"
    env = {**os.environ, "OMP_NUM_THREADS": str(1), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-c", code, str(recipe), *more], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def same_losses(a: Path, b: Path) -> None:
    mine, theirs = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    steps = [r["step"] for r in mine if "loss" in r]
    assert steps == sorted(set(steps)), "no step twice"
    assert [(r["step"], r["loss"]) for r in mine if "loss" in r] == [(r["step"], r["loss"]) for r in theirs if "loss" in r]
    assert [r["eval_loss"] for r in mine if "eval_loss" in r] == [r["eval_loss"] for r in theirs if "eval_loss" in r]


@pytest.mark.parametrize("moment", [0.0, 0.13])
def test_kill_and_resume(world: Path, moment: float) -> None:
    recipe = recipe_in(world, f"killed-{moment}")
    run = recipe.parent / "run"
    process = train_in_background(recipe)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "step-000010").is_dir():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(moment)
    process.kill()
    process.communicate()
    assert not (run / "adapter").exists()
    command.run(str(recipe), [], resume=True)
    assert adapter_files(run) == adapter_files(world / "whole" / "run")
    same_losses(run, world / "whole" / "run")
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_says_how_to_go_on(world: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, f"stopped-{number}")
    run = recipe.parent / "run"

    def stop_in_the_middle() -> None:
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 8:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_in_the_middle, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        command.run(str(recipe), [], resume=False)
    assert stopped.value.code == 130
    said = capsys.readouterr().out
    assert f"slimtune train {recipe} --resume" in said
    assert not (run / "adapter").exists()
    command.run(str(recipe), [], resume=True)
    assert adapter_files(run) == adapter_files(world / "whole" / "run")
    same_losses(run, world / "whole" / "run")


def test_another_recipe_is_not_resumed(world: Path) -> None:
    recipe = recipe_in(world, "changed")
    with pytest.raises(RecipeError, match="no run to resume"):
        command.run(str(recipe), [], resume=True)
    with pytest.raises(RecipeError, match="already holds a run"):
        command.run(str(recipe), [f"out={world / 'whole' / 'run'}"], resume=False)
    with pytest.raises(RecipeError, match="is finished"):
        command.run(str(recipe), [f"out={world / 'whole' / 'run'}"], resume=True)


def test_resuming_with_other_settings_is_refused(world: Path) -> None:
    recipe = recipe_in(world, "other")
    process = train_in_background(recipe)
    while not (recipe.parent / "run" / "checkpoints" / "step-000005").is_dir():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    with pytest.raises(RecipeError, match=r"(?s)not the one this run was started with.*lr: 0.01 in the run, 0.02 now"):
        command.run(str(recipe), ["lr=0.02"], resume=True)
