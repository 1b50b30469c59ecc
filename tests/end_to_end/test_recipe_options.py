"""Recipes with initialisers that look at the training data, LoRA+, and QA-LoRA on a group-wise 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from slimtune.cli import check, generate, inspect
from slimtune.cli import eval as evaluate
from slimtune.cli import merge as merging
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


@pytest.mark.parametrize("extra", [{}, {"add_tokens": '["<hot>", "<cold>"]'}])
def test_resuming_gives_the_same_adapter(world: Path, extra: dict[str, str]) -> None:
    settings: dict[str, object] = {"init": "eva", "save_every": 2, "max_steps": 4, **extra}
    straight = trained(world, f"straight{len(extra)}", **settings)
    folder = world / f"stopped{len(extra)}"
    recipe = tiny.recipe(folder, **{"model": world / "llama", "data": world / "data", "out": "run", "name": "a", **settings})
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


# ---- add_tokens -------------------------------------------------------------------------------------------------------
NEW = '["<hot>", "<cold>"]'


@pytest.fixture(scope="module")
def marked(world: Path) -> Path:
    """The reviews, with two words that no tokenizer has as one token."""
    folder = tiny.reviews(world / "marked")
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace("red", "<hot>").replace("stone", "<cold>"))
    return folder


@pytest.mark.parametrize("settings", [{}, {"method": "trainable_tokens", "r": ""}, {"model": "bert", "task": "classification"}])
def test_new_tokens_are_all_that_is_saved_of_the_table(
    world: Path, marked: Path, settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = world / settings.get("model", "llama")
    recipe = tiny.recipe(tmp_path, **{"data": marked, "out": "run", "name": "a", "max_steps": 4, "add_tokens": NEW, **settings, "model": base})
    check.run(recipe, [])
    inspect.run("data", [str(recipe)], rows=1, split="train")
    live = engine.train(load_recipe(recipe))
    run, classifies = tmp_path / "run", "task" in settings
    old = len(AutoTokenizer.from_pretrained(base))
    assert live.job.tokenizer.convert_tokens_to_ids(["<hot>", "<cold>"]) == [old, old + 1]
    assert any(old in ids for ids in live.job.train_rows["input_ids"])
    rows = [t for t in safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors").values() if old in t.shape or old + 2 in t.shape]
    assert not rows, "nothing is as long as the vocabulary"
    (adapter,) = state_of(live.job.model).adapters.values()
    trained_rows = {id(op.D): op.D for op in adapter.ops.values() if hasattr(op, "D")}
    assert {tuple(D.shape) for D in trained_rows.values()} == {(2, 32)}
    assert all(bool(D.detach().abs().sum(1).gt(0).any()) for D in trained_rows.values())
    assert "2 new tokens" in live.results["headline"]

    ids = torch.tensor([[old, 7, old + 1, 9]])
    with torch.no_grad():
        want = live.job.model.eval()(ids).logits
        assert torch.allclose(reopen(run, rows=False).job.model(ids).logits, want, atol=1e-6)
    evaluate.run(str(run), None, 4)
    merging.run(str(run), str(tmp_path / "merged"))
    plain = (AutoModelForSequenceClassification if classifies else AutoModelForCausalLM).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, want, atol=1e-5)
    for folder in (tmp_path / "merged", run / "tokenizer"):
        assert AutoTokenizer.from_pretrained(folder)("<hot>", add_special_tokens=False)["input_ids"] == [old]
    if not classifies:
        capsys.readouterr()
        generate.run(str(run), ["a <hot> cloud", "a <cold> cloud"], 3)
        assert "> a <cold> cloud\n> answer:" in capsys.readouterr().out


def test_full_fine_tuning_keeps_new_tokens_in_its_model(world: Path, marked: Path) -> None:
    run = trained(world, "full", method="full", r="", data=marked, add_tokens=NEW, lr=0.001)
    opened = reopen(run, rows=True)
    assert opened.job.model.get_input_embeddings().num_embeddings == len(opened.job.tokenizer)
    assert opened.job.tokenizer.convert_tokens_to_ids("<cold>") == len(opened.job.tokenizer) - 1


def test_tokens_named_by_the_method_train_beside_new_ones(world: Path, marked: Path) -> None:
    run = trained(world, "both", method="trainable_tokens", r="", tokens="[5, 9]", data=marked, add_tokens=NEW)
    (adapter,) = state_of(reopen(run, rows=False).job.model).adapters.values()
    assert {tuple(op.rows.ids.tolist())[:2] for op in adapter.ops.values()} == {(5, 9)}
    assert {len(op.rows.ids) for op in adapter.ops.values()} == {4}


@pytest.mark.parametrize(
    ("tokens", "word"),
    [('["<a>", "<a>"]', "named twice: '<a>'"), ('["<a>", " "]', "empty"), ("<a>", "list of texts"), ("[5]", "expected text")],
)
def test_a_list_of_new_tokens_that_is_none(world: Path, tokens: str, word: str) -> None:
    recipe = tiny.recipe(world / "bad_tokens", model=world / "llama", data=world / "data", add_tokens=tokens)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (problem,) = caught.value.problems
    assert problem.startswith("line ")
    assert "add_tokens: " in problem
    assert word in problem


def test_tokens_that_are_there_already_and_no_trunk_below_new_ones(world: Path) -> None:
    recipe = tiny.recipe(world / "known", model=world / "llama", data=world / "data", out="run", name="a", add_tokens='["<new>", "</s>"]')
    for start in (lambda: engine.train(load_recipe(recipe)), lambda: check.run(recipe, []), lambda: inspect.run("data", [str(recipe)], 1, "train")):
        with pytest.raises(RecipeError, match="has '</s>' already") as caught:
            start()
        assert caught.value.hint
    assert not (world / "known" / "run").exists()
    with pytest.raises(RecipeError, match="a problem") as trunk:
        load_recipe(recipe, ["cache_trunk=true", "layers=last:1"])
    assert "cache_trunk: add_tokens trains rows below" in trunk.value.problems[0]


def test_a_recipe_with_a_wrong_option_is_refused(world: Path) -> None:
    recipe = tiny.recipe(world / "bad", model=world / "llama", data=world / "data", init="evA", dropout_kind="rows", freeze="B", up_ratio=0)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    text = str(caught.value)
    for key in ("init", "dropout_kind", "freeze", "up_ratio"):
        assert key in text
