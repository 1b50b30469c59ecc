"""The demonstration, with a tiny model here and with the real one in `make test-all`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from slimtune.train.baselines import majority, tfidf
from slimtune.train.demo import demo
from slimtune.train.runs import read_json

KEYS = [
    "accuracy_before",
    "accuracy_after",
    "baseline_tfidf",
    "baseline_majority",
    "trainable_parameters",
    "adapter_bytes",
    "seconds",
    "peak_bytes",
    "predictions_agree",
]


def test_whole_demo_with_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama(tmp_path / "model")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.yaml").write_text("name: demo\nmodel: x\n")
    (tmp_path / "demo" / "stale.txt").write_text("of an earlier demo")
    small = ["limit_train=48", "limit_test=60", "layers=last:1", "dtype=float32"]
    figures = demo(str(tmp_path / "model"), compare=True, out=str(tmp_path / "demo"), settings=small)
    assert not (tmp_path / "demo" / "stale.txt").exists()
    assert list(figures) == KEYS
    assert figures == read_json(tmp_path / "demo" / "summary.json")
    assert figures["predictions_agree"] is True
    results = read_json(tmp_path / "demo" / "results.json")
    assert [f["name"] for f in results["comparison"]["figures"]] == ["LoRA", "all weights"]
    assert all(f["peak_bytes"] > 10**8 and f["checkpoint_bytes"] > 0 for f in results["comparison"]["figures"])
    said = capsys.readouterr().out
    last = said.rstrip().splitlines()[-1]
    assert f"{figures['accuracy_before']:.3f} -> {figures['accuracy_after']:.3f}" in last
    assert f"{figures['adapter_bytes']:,} bytes" in last
    assert said.count("expected ") >= 3
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "TF-IDF + logistic regression" in page
    assert "LoRA beside full fine-tuning" in page


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    tiny.llama(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("name: mine\nmodel: x\n")
    with pytest.raises(Exception, match="already holds a run"):
        demo(str(tmp_path / "model"), compare=False, out=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "recipe.yaml").read_text() == "name: mine\nmodel: x\n"


def test_baselines() -> None:
    assert majority(["a", "a", "b"], ["a", "b", "b", "b"]) == 0.25
    train = [("good good tea", "great"), ("bad bad tea", "other"), ("good cake", "great"), ("bad cake", "other")] * 2
    assert tfidf(train, [("good stuff", "great"), ("bad stuff", "other")]) == 1.0


@pytest.mark.slow
@pytest.mark.real
def test_real_demo_beats_a_word_count(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slimtune.cli.main", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert list(figures) == KEYS
    assert figures["accuracy_after"] > figures["baseline_tfidf"] > figures["baseline_majority"]
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.1
    assert figures["predictions_agree"]
    assert figures["adapter_bytes"] < 10_000_000
    print(done.stdout.splitlines()[-1])
