"""From a recipe to an adapter: the run folder, its figures, and what can be done with it afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from slimtune.cli import chat, generate, merge
from slimtune.cli import eval as eval_command
from slimtune.cli import train as command
from slimtune.core.errors import CapabilityError, FileError, RecipeError, SlimtuneError
from slimtune.train.reopen import reopen
from slimtune.train.report import read_metrics
from slimtune.train.runs import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    tiny.llama(root / "llama")
    tiny.bert(root / "bert")
    tiny.reviews(root / "data", train=96)
    return root


def trained(world: Path, name: str, **settings: object) -> Path:
    recipe = tiny.recipe(world / name, **{"model": world / "llama", "data": world / "data", "out": "run", "name": "a", **settings})
    command.run(str(recipe), [], resume=False)
    return world / name / "run"


@pytest.fixture(scope="module")
def causal(world: Path) -> Path:
    return trained(world, "causal", epochs=6, r=8)


@pytest.fixture(scope="module")
def classifier(world: Path) -> Path:
    return trained(world, "classifier", model=world / "bert", task="classification", epochs=8, lr=0.02)


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    return trained(world, "plain", max_steps=4)


def test_run_folder_is_complete(causal: Path) -> None:
    names = {p.name for p in causal.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "adapter",
        "checkpoints",
        "results.json",
        "summary.json",
        "report.html",
        "figures",
    } <= names
    assert not [p for p in causal.rglob("*") if p.name.endswith(".tmp")]
    summary = read_json(causal / "summary.json")
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["adapter_bytes"] == sum(p.stat().st_size for p in (causal / "adapter").iterdir())
    assert summary["peak_bytes"] > 10**8
    assert summary["steps"] == 72
    results = read_json(causal / "results.json")
    assert results["labels"] == ["no", "yes"] or results["labels"] == ["yes", "no"]
    assert len(results["samples"]) >= 1
    page = (causal / "report.html").read_text()
    assert results["headline"].split(":")[0] in page


def test_it_learns(causal: Path, classifier: Path) -> None:
    assert read_json(causal / "summary.json")["accuracy_after"] >= 0.8
    assert read_json(classifier / "summary.json")["accuracy_after"] >= 0.8


def test_metrics_count_every_step_and_token(causal: Path) -> None:
    rows = [r for r in read_metrics(causal / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 73))
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in rows)
    assert rows[-1]["tokens"] == read_json(causal / "summary.json")["tokens"]
    assert rows[-1]["tokens"] > rows[0]["tokens"] > 0
    assert rows[-1]["lr"] < rows[0]["lr"]
    assert any("eval_accuracy" in r for r in read_metrics(causal / "metrics.jsonl"))


def test_checkpoints_hold_the_adapter_and_never_the_base(causal: Path) -> None:
    newest = sorted((causal / "checkpoints").iterdir())[-1]
    assert {p.name for p in newest.iterdir()} == {
        "adapter",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "state.safetensors",
        "trainer_state.json",
        "progress.json",
    }
    trained_bytes = read_json(causal / "summary.json")["trainable_parameters"] * 4
    assert (newest / "state.safetensors").stat().st_size < trained_bytes * 1.5 + 20_000
    assert (newest / "adapter" / "adapter_model.safetensors").read_bytes() == (causal / "adapter" / "adapter_model.safetensors").read_bytes()


def test_same_recipe_same_bytes(world: Path, causal: Path) -> None:
    again = trained(world, "again", epochs=6, r=8)
    name = "adapter_model.safetensors"
    assert (again / "adapter" / name).read_bytes() == (causal / "adapter" / name).read_bytes()


def test_reopened_run_answers_as_the_live_one(causal: Path, classifier: Path) -> None:
    for run in (causal, classifier):
        opened = reopen(run, rows=True)
        found = opened.job.evaluate(opened.job.held_out())
        summary = read_json(run / "summary.json")
        assert found.accuracy == summary["accuracy_after"]
        assert found.loss == pytest.approx(summary["loss_after"], rel=1e-6)


def test_eval_prints_both_sides_and_takes_other_data(causal: Path, classifier: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_command.run(str(causal), None, None)
    said = capsys.readouterr().out
    assert "16 examples" in said
    assert "without" in said
    assert "accuracy" in said
    more = tiny.reviews(world / "more", train=4, test=30, seed=9) / "test.jsonl"
    eval_command.run(str(classifier), str(more), 20)
    assert "20 examples" in capsys.readouterr().out
    with pytest.raises(FileError, match="no file"):
        eval_command.run(str(causal), str(world / "nothing.jsonl"), None)


def test_generate_answers_in_the_trained_form(causal: Path, classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.run(str(causal), ["a red stone", "a blue stone"], 4)
    said = capsys.readouterr().out
    assert "> a red stone\n> answer:" in said
    assert said.count("yes") + said.count("no") >= 2
    with pytest.raises(CapabilityError, match="classifier"):
        generate.run(str(classifier), ["x"], 4)


def test_merge_writes_a_plain_checkpoint(causal: Path, classifier: Path, tmp_path: Path) -> None:
    for run, auto in ((causal, AutoModelForCausalLM), (classifier, AutoModelForSequenceClassification)):
        out = tmp_path / run.parent.name
        merge.run(str(run), str(out))
        with pytest.raises(FileError, match="not empty"):
            merge.run(str(run), str(out))
        plain, tokenizer = auto.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert not any("slim" in n for n, _ in plain.named_modules())
        live = reopen(run, rows=False).job.model
        inputs = tokenizer("a red stone", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(**inputs).logits, live(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_runs_through_the_same_engine(world: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        world / "full",
        model=world / "llama",
        data=world / "data",
        out="run",
        name="a",
        method="full",
        max_steps=12,
        lr=0.003,
        dtype="bfloat16",
    )
    text = "".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("r:"))
    recipe.write_text(text)
    command.run(str(recipe), [], resume=False)
    run = world / "full" / "run"
    summary = read_json(run / "summary.json")
    assert summary["loss_after"] < summary["loss_before"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert summary["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert reopen(run, rows=True).adapter is None
    merge.run(str(run), str(tmp_path / "copy"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy") is not None


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_base_trains_and_merges_into_a_plain_model(world: Path, tmp_path: Path, quantize: str) -> None:
    tiny.llama(world / "wide", width=64)  # bitsandbytes rounds blocks of 64
    run = trained(world, quantize, model=world / "wide", quantize=quantize, max_steps=6)
    assert read_json(run / "summary.json")["loss_after"] < read_json(run / "summary.json")["loss_before"]
    merge.run(str(run), str(tmp_path / "plain"))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": "true"},
        {"memory": "fast"},
        {"memory": "least"},
        {"accumulate": 2, "batch_size": 4},
        {"group_by_length": "false", "schedule": "constant"},
    ],
)
def test_settings_that_change_how_not_what(world: Path, plain: Path, settings: dict[str, object]) -> None:
    base, other = plain, trained(world, "-".join(f"{k}-{v}" for k, v in settings.items()), max_steps=4, **settings)
    a, b = (safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors") for run in (base, other))
    if "schedule" in settings:
        assert any(not torch.equal(a[k], b[k]) for k in a)
    else:
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["text", "messages", "prompt+completion"])
def test_every_shape_of_data(world: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world / f"data-{kind}"
    folder.mkdir(exist_ok=True)
    source = [json.loads(line) for line in (world / "data" / "train.jsonl").read_text().splitlines()][:24]
    row = {
        "text": lambda r: {"text": r["text"]},
        "prompt+completion": lambda r: {"prompt": r["text"] + "\n", "completion": r["text"][::-1]},
        "messages": lambda r: {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}]},
    }[kind]
    (folder / "train.jsonl").write_text("".join(json.dumps(row(r)) + "\n" for r in source))
    model = world / "llama"
    if kind == "messages":
        model = world / "chatty"
        tiny.llama(model)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        )
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    run = trained(world, f"shape-{kind}", model=model, data=folder, max_steps=4, valid_fraction=0.2)
    summary = read_json(run / "summary.json")
    assert summary["loss_after"] < summary["loss_before"]
    capsys.readouterr()
    generate.run(str(run), ["red stone"], 3)
    assert capsys.readouterr().out
    lines = iter(["red stone", "blue cloud", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("slimtune.cli.chat.LONGEST", 4)
    chat.run(str(run))
    assert capsys.readouterr().out.count("model> ") == 2


@pytest.mark.parametrize("settings", [{"lr": "1e30", "clip": 0}, {"lr": "1e38"}])
def test_nan_at_once_is_an_error_and_leaves_nothing(world: Path, settings: dict[str, object]) -> None:
    recipe = tiny.recipe(
        world / f"nan-{len(settings)}",
        model=world / "llama",
        data=world / "data",
        out="run",
        name="a",
        schedule="constant",
        **{"epochs": 2, **settings},
    )
    with pytest.raises(RecipeError, match=r"became|holds NaN or infinity") as error:
        command.run(str(recipe), [], resume=False)
    assert "lower lr" in error.value.hint
    assert not (recipe.parent / "run").exists()


def test_mistakes_leave_nothing_behind(world: Path) -> None:
    recipe = tiny.recipe(world / "wrong", model=world / "llama", data=world / "data", out="run", name="a")
    for override in ("targets=no_such_module", "layers=last:99x", "max_length=100000"):
        with pytest.raises(SlimtuneError):
            command.run(str(recipe), [override], resume=False)
        assert not (recipe.parent / "run").exists()


def test_the_trunk_cache_changes_nothing_but_the_work(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"epochs": 3, "layers": "last:1", "method": "lora"}
    plain = trained(world, "uncached", **common)
    capsys.readouterr()
    cached = trained(world, "cached", cache_trunk=True, **common)
    said = capsys.readouterr().err
    assert "trunk cache: 1 blocks of model.layers" in said
    assert ", 0 of" not in said, "nothing was looked up"
    a, b = (safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors") for run in (plain, cached))
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=1e-4, atol=1e-5)
