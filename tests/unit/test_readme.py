"""The README's Python example runs as it stands, and its recipe is a valid one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(), re.S)
    assert found, f"no {language} block in the README"
    return found[1]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(block("python"), "README.md", "exec"), scope)
    assert (tmp_path / "out" / "support" / "adapter_model.safetensors").is_file()
    assert scope["logits"].shape == (3, 8, 100)  # type: ignore[attr-defined]


def test_the_python_example_is_short() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    from slimtune.train.load_recipe import load_recipe

    (tmp_path / "reviews.jsonl").write_text('{"text": "good", "label": "great"}\n' * 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(block("yaml"))
    assert load_recipe(path, []).options["r"] == 16
