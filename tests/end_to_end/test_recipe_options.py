"""Recipes with initialisers that look at the training data, LoRA+, and QA-LoRA on a group-wise 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from slimtune.cli import train as command
from slimtune.core.errors import RecipeError
from slimtune.core.state import state_of
from slimtune.ports.group_quantised import GroupLinear
from slimtune.train import engine
from slimtune.train.load_recipe import load_recipe
from slimtune.train.reopen import reopen
from slimtune.train.runs import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("options")
    tiny.llama(root / "llama")
    tiny.bert(root / "bert")
    tiny.reviews(root / "data", train=64)
    return root


def trained(world: Path, name: str, **settings: object) -> Path:
    recipe = tiny.recipe(world / name, **{"model": world / "llama", "data": world / "data", "out": "run", "name": "a", "max_steps": 3, **settings})
    command.run(str(recipe), [], resume=False)
    return world / name / "run"


def test_the_batches_come_from_the_training_rows(world: Path) -> None:
    run = trained(world, "eva", init="eva", init_batches=4, up_ratio=16, lr=0.002)
    tensors = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
    ranks = [t.shape[0] for k, t in tensors.items() if "lora_A" in k]
    assert sum(ranks) == 14 * 4
    assert len(set(ranks)) > 1
    assert read_json(run / "summary.json")["loss_after"] < read_json(run / "summary.json")["loss_before"]


def test_a_classifier_starts_from_data_too(world: Path) -> None:
    run = trained(world, "classifier", model=world / "bert", task="classification", init="lora_ga", r=2)
    tensors = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {4}  # a start away from zero is written as twice the rank


def test_resuming_gives_the_same_adapter(world: Path) -> None:
    straight = trained(world, "straight", init="eva", save_every=2, max_steps=4)
    folder = world / "stopped"
    recipe = tiny.recipe(folder, model=world / "llama", data=world / "data", out="run", name="a", init="eva", save_every=2, max_steps=4)
    job = load_recipe(recipe)

    class Enough(Exception):
        pass

    class Stops(engine.TrainerCallback):
        def on_save(self, *args: object, **kwargs: object) -> None:
            raise Enough

    ordinary = engine._trainer

    def with_stop(*args: object) -> engine.SlimTrainer:
        trainer = ordinary(*args)  # type: ignore[arg-type]
        trainer.add_callback(Stops())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_trainer", with_stop)
        with pytest.raises(Enough):
            engine.train(job)
    engine.train(job, resume=True)
    a, b = (safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, folder / "run"))
    for k in a:
        torch.testing.assert_close(a[k], b[k])


def test_the_up_factors_get_their_rate(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    ordinary = engine.SlimTrainer.create_optimizer

    def note(self: engine.SlimTrainer, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        made = ordinary(self, model)
        seen.append(sorted({g["lr"] for g in made.param_groups}))
        return made

    monkeypatch.setattr(engine.SlimTrainer, "create_optimizer", note)
    trained(world, "plus", up_ratio=16, lr=0.001, max_steps=1)
    assert seen[0] == pytest.approx([0.001, 0.016])


def test_qa_lora_on_a_four_bit_base(world: Path) -> None:
    run = trained(world, "qa", method="qa_lora", quantize="group4", max_steps=8)
    assert read_json(run / "summary.json")["loss_after"] < read_json(run / "summary.json")["loss_before"]
    opened = reopen(run, rows=False)
    layers = [m for m in opened.job.model.modules() if isinstance(m, GroupLinear)]
    assert len(layers) == 14
    (adapter,) = state_of(opened.job.model).adapters.values()
    assert {op.group for op in adapter.ops.values()} == {32}
    assert json.loads((run / "results.json").read_text())


def test_a_recipe_with_a_wrong_option_is_refused(world: Path) -> None:
    recipe = tiny.recipe(world / "bad", model=world / "llama", data=world / "data", init="evA", dropout_kind="rows", freeze="B", up_ratio=0)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    text = str(caught.value)
    for key in ("init", "dropout_kind", "freeze", "up_ratio"):
        assert key in text
