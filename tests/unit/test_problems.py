"""Classifiers of every kind (a class, several labels, a score), choices among many answers, and where generation stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CHATML, bert, jsonl, llama, tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from slimtune.cli.main import main
from slimtune.core.errors import DataError, RecipeError
from slimtune.train.candidates import token_candidates
from slimtune.train.data import load_data
from slimtune.train.engine import train
from slimtune.train.evaluate import Evaluation, evaluate_causal, evaluate_classifier
from slimtune.train.job import stop_at
from slimtune.train.load_recipe import load_recipe
from slimtune.train.loss import classification_loss
from slimtune.train.recipe import Recipe
from slimtune.train.reopen import reopen
from slimtune.train.tokens import IGNORE

SEVERAL = [{"text": f"tea number {i}", "label": ["warm", "sweet"][: i % 3]} for i in range(24)]
SCORES = [{"text": f"tea number {i}", "label": i / 7} for i in range(24)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(world: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Train for a few steps; return the run's folder."""
    jsonl(world / "rows.jsonl", rows)
    keys = {"model": "model", "data": "rows.jsonl", "r": 2, "max_steps": 2, "batch_size": 4, "valid_fraction": 0.25, "dtype": "float32", **settings}
    (world / "r.yaml").write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
    return Path(train(load_recipe(world / "r.yaml"), say=lambda line: None).folder.path)


def classifier(outputs: int, problem: str) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=outputs, problem_type=problem
    )
    return BertForSequenceClassification(config).eval()


# ---- several labels and scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "problem", "labels"),
    [
        (3, "single_label_classification", torch.tensor([0, 2, 1, 1])),
        (3, "multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
        (1, "regression", torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
)
def test_losses_and_figures_are_those_of_transformers(outputs: int, problem: str, labels: torch.Tensor) -> None:
    model, ids = classifier(outputs, problem), torch.arange(4 * 6).reshape(4, 6) + 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = model(**inputs, labels=labels).loss
    torch.testing.assert_close(classification_loss(model, {**inputs, "labels": labels}, None), theirs)
    found = evaluate_classifier(model, [{"input_ids": i.tolist(), "label": y.tolist()} for i, y in zip(ids, labels, strict=True)], 0, list("abc"), 3)
    assert found.loss == pytest.approx(float(theirs), rel=1e-5)
    logits = model(**inputs).logits.detach()
    if problem == "multi_label_classification":
        right = ((logits > 0) == labels.bool()).all(dim=1).float().mean()
        assert found.figures()["all labels right"] == pytest.approx(float(right))
        assert found.words[0] == (", ".join(n for n, on in zip("abc", logits[0] > 0, strict=True) if on) or "(none)")
    if problem == "regression":
        assert found.figures()["mean absolute error"] == pytest.approx(float((logits[:, 0] - labels).abs().mean()), rel=1e-5)
        assert {"Pearson", "Spearman"} <= set(found.figures())


@pytest.mark.parametrize(("rows", "names", "problem"), [(SEVERAL, ["sweet", "warm"], "multi_label_classification"), (SCORES, [], "regression")])
def test_several_labels_and_scores_train_and_come_back(world: Path, rows: list[dict[str, Any]], names: list[str], problem: str) -> None:
    bert(world / "model")
    folder = run(world, rows)
    results = json.loads((folder / "results.json").read_text())
    assert (results["task"], results["labels"]) == ("classification", names)
    assert results["samples"][0]["expected"]
    opened = reopen(folder, rows=True)
    assert opened.job.model.config.problem_type == problem
    again = opened.job.evaluate(opened.job.held_out()).figures()
    assert {m["name"]: m["after"] for m in results["measures"]} == pytest.approx(again, abs=1e-5)
    assert main(["merge", str(folder), "--out", "merged"]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(world / "merged")
    assert (merged.config.problem_type, merged.num_labels) == (problem, len(names) or 1)


def test_scores_are_asked_for_or_seen_and_the_hints_work(world: Path) -> None:
    def labels(rows: list[dict[str, Any]], task: str = "auto") -> str:
        path = jsonl(world / "a.jsonl", rows)
        return load_data(Recipe(model="m", data=str(path), task=task, valid_fraction=0.0), tokenizer(), "classification").format  # type: ignore[arg-type]

    assert labels(SCORES) == "text+score"
    late = [{"text": "t", "label": i if i < 1_500 else 0.5} for i in range(1_600)]
    with pytest.raises(DataError, match=r"row 1501: the label 0.5 is a number with a fraction; `task: regression` reads every label as a score"):
        labels(late)
    assert labels(late, "regression") == "text+score"
    with pytest.raises(DataError, match="'x' is not a score; `task: classification` reads labels as classes"):
        labels([{"text": "t", "label": w} for w in "xyxy"], "regression")
    assert labels([{"text": "t", "label": w} for w in "xyxy"], "classification") == "text+label"
    (world / "n.csv").write_text("text,label\n" + "".join(f"t,{i / 7:.3f}\n" for i in range(40)))
    path = world / "n.csv"
    notes = load_data(Recipe(model="m", data=str(path), valid_fraction=0.0), tokenizer(), "classification").notes
    assert any("`task: regression` reads them as scores" in note for note in notes)
    assert load_data(Recipe(model="m", data=str(path), task="regression"), tokenizer(), "classification").format == "text+score"


def test_a_causal_lm_is_not_trained_on_scores(world: Path) -> None:
    llama(world / "model")
    with pytest.raises(RecipeError, match="a score each") as caught:
        run(world, SCORES, task="causal_lm")
    assert "task: classification" in caught.value.hint
    assert (run(world, SCORES, out="one") / "adapter").is_dir()  # left out, as the hint says


# ---- a choice among many --------------------------------------------------------------------------------------------


def test_many_answers_are_written_token_by_token_and_each_step_takes_the_likeliest(world: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    ).eval()
    answers = [[5 + i % 5, 20 + i // 5, 1] for i in range(25)] + [[5, 1], [60, 61, 62, 1]]
    prompts = [[40 + i, 41, 42 + i % 3] for i in range(27)]
    rows = [{"input_ids": [*p, *a], "labels": [*[IGNORE] * len(p), *a]} for p, a in zip(prompts, answers, strict=True)]
    found = token_candidates(rows, str)
    assert found is not None
    result = evaluate_causal(model, rows, 0, found, batch_rows=4)
    for prompt, chosen in zip(prompts, result.predictions, strict=True):
        left, said = list(map(list, found.answers)), []
        while any(len(a) > len(said) for a in left):
            logits = model(torch.tensor([[*prompt, *said]])).logits[0, -1]
            said.append(max({a[len(said)] for a in left}, key=lambda t: float(logits[t])))
            left = [a for a in left if a[: len(said)] == said]
        assert list(found.answers[chosen]) == said
    assert result.accuracy == sum(list(found.answers[p]) == a for p, a in zip(result.predictions, answers, strict=True)) / 27


def test_more_than_twenty_classes_have_an_accuracy(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(world / "model")
    folder = run(world, [{"text": f"do {i % 25}", "label": f"intent {i % 25}"} for i in range(120)])
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["accuracy_after"] <= 1
    assert main(["eval", str(folder)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert Evaluation(**json.loads((folder / "before.json").read_text())).accuracy is not None


# ---- data that moved or changed -------------------------------------------------------------------------------------


def test_a_run_is_measured_on_other_data_when_its_own_have_moved(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(world / "model")
    rows = [{"prompt": f"q{i}", "completion": (" yes", " no")[i % 2]} for i in range(40)]
    folder = run(world, rows)
    new = jsonl(world / "new.jsonl", rows[:7])
    assert main(["eval", str(folder), "--data", str(new)]) == 0
    with_them = capsys.readouterr().out
    (world / "rows.jsonl").rename(world / "moved.jsonl")
    assert main(["eval", str(folder), "--data", str(new)]) == 0
    assert capsys.readouterr().out == with_them
    assert "accuracy" in with_them
    for command in (["eval", str(folder)], ["train", "r.yaml", "--resume"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "moved.jsonl" in said
    assert main(["generate", str(folder), "--prompt", "q1", "--max-new-tokens", "2"]) == 0


def test_a_run_does_not_go_on_with_other_rows(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(world / "model")
    rows = [{"text": f"tea {i}", "label": "ab"[i % 2]} for i in range(24)]
    (run(world, rows) / "results.json").unlink()  # as if it had been killed at the end
    jsonl(world / "rows.jsonl", [*rows[:-1], {"text": "other", "label": "a"}])
    assert main(["train", "r.yaml", "--resume"]) == 2
    assert "the rows have changed since this run began: train" in capsys.readouterr().err
    jsonl(world / "rows.jsonl", rows)
    assert main(["train", "r.yaml", "--resume"]) == 0


# ---- where generation stops -----------------------------------------------------------------------------------------


def test_a_model_stops_where_its_answers_were_trained_to_end(world: Path) -> None:
    llama(world / "model")
    words = tokenizer(CHATML)
    words.eos_token = "<|endoftext|>"
    words.save_pretrained(world / "model")
    config = json.loads((world / "model" / "generation_config.json").read_text()) | {"eos_token_id": words.eos_token_id}
    (world / "model" / "generation_config.json").write_text(json.dumps(config))
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "tea"}]} for i in range(12)]
    both = [words.eos_token_id, words.convert_tokens_to_ids("<|im_end|>")]
    folder = run(world, rows, max_length=64)
    assert reopen(folder, rows=False).job.model.generation_config.eos_token_id == both
    assert main(["merge", str(folder), "--out", "merged"]) == 0
    assert AutoModelForCausalLM.from_pretrained(world / "merged").generation_config.eos_token_id == both
    whole = run(world, rows, method="full", r="", max_length=64, out="whole")
    assert AutoModelForCausalLM.from_pretrained(whole / "model").generation_config.eos_token_id == both


@pytest.mark.parametrize(("known", "after"), [(None, [7, 8]), (7, [7, 8]), ([9], [9, 7, 8]), ([8, 7], [8, 7])])
def test_stops_are_added_to_those_that_are_there(known: Any, after: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    model.generation_config.eos_token_id = known
    stop_at(model, [7, 8])
    assert model.generation_config.eos_token_id == after


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_escape_codes_of_data_do_not_reach_the_terminal_or_the_report(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(world / "model")
    rows = [{"text": f"tea \x1b[31m\u202e{i}", "label": ("a\x1b[2J", "b")[i % 2], "k\x07": 1} for i in range(24)]
    folder = run(world, rows)
    (world / "bad.jsonl").write_text(json.dumps({"\x1b[2Jtext": 1}) + "\n")
    for command in (["check", "r.yaml"], ["inspect", "data", "r.yaml"], ["eval", str(folder)], ["check", "r.yaml", "data=bad.jsonl"]):
        main(command)
        out, err = capsys.readouterr()
        assert not {"\x1b[2J", "\x1b[31m", "\x07", "\u202e"} & {c for c in ("\x1b[2J", "\x1b[31m", "\x07", "\u202e") if c in out + err}, command
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_classifiers_loss_is_a_mean_over_the_step() -> None:
    model, ids = classifier(3, "multi_label_classification"), torch.arange(12).reshape(2, 6) + 1
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    whole = F.binary_cross_entropy_with_logits(model(input_ids=ids).logits, labels, reduction="sum")
    torch.testing.assert_close(classification_loss(model, inputs, 12), whole / 12)
