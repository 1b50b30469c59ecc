"""The generated pages are up to date and their examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slimtune.testing.matrix import own_methods
from slimtune.testing.method_pages import choose_when, main, page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    assert main(["--check", "docs/methods"]) == 0, "run: make docs"


@pytest.mark.parametrize("name", own_methods())
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", (DOCS / "methods" / f"{name}.md").read_text(), re.S)
    assert found
    monkeypatch.chdir(tmp_path)
    exec(compile(found[1], f"{name}.md", "exec"), {})
    assert (tmp_path / "out" / "mine" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", own_methods())
def test_every_method_says_when_to_choose_it(name: str) -> None:
    assert len(choose_when(name)) > 20


def test_the_arena_shows_on_the_page_of_its_method() -> None:
    row = {"name": "ia3", "who": "ia3", "score": 0.81, "spread": 0.004, "seconds": 0.2, "refused": None}
    assert "| A task | ia3 | 0.810 | 0.004 | 0.200 |" in page("ia3", {"A task": [row]})


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.md")), ids=lambda f: str(f.relative_to(DOCS)))
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (file.parent / target).exists(), f"{file.name} links to {target}"
