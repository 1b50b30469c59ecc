"""Two CPU processes (gloo) give the adapter that one process gives with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from slimtune.cli import train as command
from slimtune.train.report import read_metrics
from slimtune.train.runs import read_json

CASES = {
    "causal": {"task": "causal_lm"},
    "accumulated": {"task": "causal_lm", "accumulate": 2},
    "classifier": {"task": "classification"},
}
RUN = "import sys; from slimtune.cli import train\nfor recipe in sys.argv[1:]: train.run(recipe, [], resume=False)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained on two processes, in one launch."""
    root = tmp_path_factory.mktemp("two")
    tiny.llama(root / "causal_lm")
    tiny.bert(root / "classification")
    tiny.reviews(root / "data", train=48)
    script = root / "train.py"
    script.write_text(RUN)
    recipes = [str(recipe(root, name, processes=2)) for name in CASES]
    said = launch(["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], script, recipes)
    assert said.count("report:") == len(CASES), "one process speaks"
    return root


def launch(launcher: list[str], script: Path, recipes: list[str]) -> str:
    """Run the recipes on two processes; return what was printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", *launcher, str(script), *recipes], env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def recipe(root: Path, name: str, processes: int, by: str = "") -> Path:
    case = CASES[name]
    folder, batch = root / f"{name}-{processes}{by}", 8 // processes
    return tiny.recipe(folder, model=root / case["task"], data=root / "data", name="a", out="run", epochs=2, batch_size=batch, **case)


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one_with_twice_the_batch(world: Path, name: str) -> None:
    command.run(str(recipe(world, name, processes=1)), [], resume=False)
    one, two = (world / f"{name}-{n}" / "run" for n in (1, 2))
    a, b = (safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    assert any(t.abs().max() > 1e-2 for t in a.values()), "something was learnt"
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-5, rtol=1e-3)
    mine, theirs = (read_metrics(run / "metrics.jsonl") for run in (one, two))
    assert [r["loss"] for r in mine if "loss" in r] == pytest.approx([r["loss"] for r in theirs if "loss" in r], rel=1e-4)
    x, y = (read_json(run / "summary.json") for run in (one, two))
    assert x["tokens"] == y["tokens"]
    assert x["accuracy_after"] == y["accuracy_after"]
    assert x["loss_after"] == pytest.approx(y["loss_after"], rel=1e-4)


def test_accelerate_launch(world: Path) -> None:
    """accelerate's own launcher runs the same recipe; on CPUs without MPI it starts one process, so it must equal one process."""
    path = recipe(world, "causal", processes=1, by="-accelerate")
    flags = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch(["accelerate.commands.launch", *flags], world / "train.py", [str(path)])
    plain = recipe(world, "causal", processes=1, by="-plain")
    command.run(str(plain), [], resume=False)
    files = [world / run / "run" / "adapter" / "adapter_model.safetensors" for run in ("causal-1-accelerate", "causal-1-plain")]
    one, other = (safetensors.torch.load_file(file) for file in files)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-5, rtol=1e-3)
