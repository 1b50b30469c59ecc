"""A run whose adapter becomes non-finite has failed: it stops, writes nothing of it, and names the last finite checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from slimtune.core.errors import RecipeError
from slimtune.core.finite import is_finite


def run_with_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, method: str, save_every: int = 2) -> Any:
    """Train a tiny model whose optimizer writes infinity into what is trained at one step."""
    from slimtune.train.engine import train
    from slimtune.train.load_recipe import load_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny.llama(tmp_path / 'base')}\nmethod: {method}\ndata: {tiny.reviews(tmp_path / 'data')}\nmax_steps: 4\nbatch_size: 4\n"
        f"dtype: float32\nout: {tmp_path / 'run'}\nsave_every: {save_every}\n"
    )
    steps = [0]
    plain = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        steps[0] += 1
        if steps[0] == at:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("inf")
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return train(load_recipe(recipe), say=lambda line: None)


@pytest.mark.parametrize("method", ["lora\nr: 2", "full"])
def test_a_run_that_ends_with_a_non_finite_adapter_has_failed(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"holds NaN or infinity after step 4(.|\n)*the last finite checkpoint is kept: .*step-000002"):
        run_with_bad_step(tmp_path, monkeypatch, 4, method)
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run / "adapter").exists()
    assert not (run / "model").exists()
    assert not (run / "results.json").exists()
    for file in run.rglob("*.safetensors"):
        assert all(is_finite(t) for t in load_file(file).values()), file


def test_a_run_stops_in_the_step_that_makes_it_non_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="holds NaN or infinity after step 3"):
        run_with_bad_step(tmp_path, monkeypatch, 3, "lora\nr: 2")


def test_a_failed_run_without_a_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="holds NaN or infinity after step 1"):
        run_with_bad_step(tmp_path, monkeypatch, 1, "lora\nr: 2")
    assert not (tmp_path / "run").exists()
