"""Every method through the commands a user types: check, train, eval, on a decoder and on a classifier, with the method's defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from slimtune.cli import check, train
from slimtune.cli import eval as eval_command
from slimtune.testing.matrix import own_methods
from slimtune.train.runs import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("every")
    tiny.llama(root / "llama")
    tiny.bert(root / "bert")
    tiny.reviews(root / "data", train=48)
    return root


@pytest.mark.parametrize("base", ["llama", "bert"])
@pytest.mark.parametrize("method", own_methods())
def test_check_train_eval(world: Path, method: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"task": "classification"} if base == "bert" else {}
    recipe = tiny.recipe(
        world / f"{method}-{base}", model=world / base, data=world / "data", out="run", name="a", method=method, max_steps=4, lr=1e-2, r="", **task
    )
    check.run(recipe, [])
    assert "the recipe is sound" in capsys.readouterr().out
    train.run(str(recipe), [], resume=False)
    run = recipe.parent / "run"
    after = next(m["after"] for m in read_json(run / "results.json")["measures"] if m["name"] == "loss")
    capsys.readouterr()
    eval_command.run(str(run), None, None)
    assert f"{after:.3f}" in capsys.readouterr().out, "the reloaded adapter does not give the figures of the run"
