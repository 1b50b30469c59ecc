"""The run folder and its page: complete, self-contained, escaped; clear errors for what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slimtune.core.errors import FileError, RecipeError
from slimtune.train.environment import environment
from slimtune.train.figures import accuracy_bars, smooth
from slimtune.train.report import duration, flatten, number, read_metrics, size, write_report
from slimtune.train.runs import RunFolder, new_run, open_run, read_json, write_json, write_text

RESULTS: dict[str, Any] = {
    "name": "try",
    "headline": "LoRA on tiny: 20 steps in 3.0 s.",
    "task": "causal_lm",
    "format": "text+label",
    "labels": ["yes", "no"],
    "model": {"name": "tiny", "source": "tiny", "parameters": 1000, "bytes": 4000, "dtype": "float32"},
    "adapter": {"method": "LoRA(r=4)", "trainable": 100, "percent": 10.0, "bytes": 900, "modules": "14 modules in 2 blocks", "folder": "adapter"},
    "training": {"steps": 20, "examples": 48, "seconds": 3.0, "tokens": 600, "tokens_per_second": 200.0, "peak_bytes": 5_000_000, "method": "lora"},
    "evaluated": 16,
    "measures": [{"name": "accuracy", "before": 0.5, "after": 0.9}, {"name": "loss", "before": 2.0, "after": 1.0}],
    "baselines": [{"name": "always the larger class", "accuracy": 0.6}],
    "confusion": {"labels": ["yes", "no"], "counts": [[7, 1], [1, 7]]},
    "comparison": {"title": "side by side", "columns": ["LoRA", "full"], "rows": [["seconds", "1", "2"]], "note": "same steps"},
    "samples": [{"prompt": "<script>alert('x')</script> & \"quoted\"", "expected": "yes", "before": "<b>no</b>", "after": "yes"}],
    "exact_answers": True,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "try")
    rows = [{"step": s, "loss": 2.0 / s, "lr": 1e-3, "tokens": 30 * s, "seconds": 0.1 * s, "tokens_per_second": 300.0} for s in range(1, 21)]
    rows.append({"step": 20, "eval_loss": 0.3, "eval_accuracy": 0.8})
    write_text(folder.metrics, "".join(json.dumps(r) + "\n" for r in rows))
    write_text(folder.recipe, "model: tiny\nmethod: lora\nr: 4\n")
    write_json(folder.environment, environment())
    write_json(folder.results, RESULTS)
    return folder


class Page(HTMLParser):
    """Tags that were opened and closed, and everything that points elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "source", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_asks_nothing_of_the_network(run: RunFolder) -> None:
    text = write_report(run).read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "script" not in page.tags
    assert "prefers-color-scheme: dark" in text
    for shown in ("LoRA on tiny", "0.900", "14 modules in 2 blocks", "always the larger class", "side by side", "torch", "r: 4"):
        assert shown in text


def test_values_are_escaped(run: RunFolder) -> None:
    text = write_report(run).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(" in text
    assert "&lt;b&gt;no&lt;/b&gt;" in text


def test_figures_are_files_in_both_themes(run: RunFolder) -> None:
    write_report(run)
    names = {"loss", "accuracy", "learning_rate", "speed", "confusion"}
    for folder in (run.figures, run.figures / "dark"):
        assert {p.stem for p in folder.glob("*.png")} == names
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))


def test_a_run_without_held_out_data_has_a_page_too(run: RunFolder) -> None:
    write_json(
        run.results,
        {**RESULTS, "measures": [], "baselines": [], "confusion": None, "comparison": None, "samples": [], "evaluated": 0},
    )
    text = write_report(run).read_text()
    assert "Before and after" not in text
    assert "What was trained" in text


def test_page_says_what_is_missing(run: RunFolder) -> None:
    run.environment.unlink()
    with pytest.raises(FileError, match=r"environment\.json"):
        write_report(run)
    write_text(run.results, "{not json")
    with pytest.raises(FileError, match="cannot be read"):
        write_report(run)


def test_a_line_cut_short_by_a_kill_is_left_out(run: RunFolder) -> None:
    whole = read_metrics(run.metrics)
    with run.metrics.open("a") as f:
        f.write('{"step": 21, "los')
    assert read_metrics(run.metrics) == whole
    run.metrics.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(FileError, match="line 1"):
        read_metrics(run.metrics)


def test_words_for_figures() -> None:
    assert [size(n) for n in (0, 999, 1500, 98_000_000, 2.5e9, None)] == ["0 B", "999 B", "1.5 kB", "98.0 MB", "2.5 GB", "–"]
    assert [duration(s) for s in (0.4, 61, 3700, None)] == ["0.4 s", "1 min 01 s", "1 h 01 min", "–"]
    assert [number(x) for x in (True, None, 12345, 0.8534, 1e-5, 1234.5, ["a", 2])] == [
        "yes",
        "–",
        "12,345",
        "0.853",
        "1e-05",
        "1,234",
        "a, 2",
    ]
    assert flatten({"a": {"b": 0.001, "c": None}, "d": "x"}) == [("a.b", "0.001"), ("d", "x")]
    assert smooth([1.0, 1.0, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert accuracy_bars(RESULTS)[-1] == ("after training", 0.9, True)


def test_open_run_explains_itself(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such run") as missing:
        open_run(tmp_path / "tri")
    assert str(run.path) in missing.value.hint
    with pytest.raises(FileError, match="no result yet"):
        open_run(run.path)
    run.checkpoint(7).mkdir(parents=True)
    with pytest.raises(FileError, match="stopped at step-000007"):
        open_run(run.path)
    run.adapter.mkdir()
    assert open_run(run.path).adapter == run.adapter
    (run.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="not a run folder") as deeper:
        open_run(run.adapter)
    assert "folder above" in deeper.value.hint
    with pytest.raises(FileError, match="this is a file"):
        open_run(run.results)


def test_new_run_never_writes_over_another(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="already holds a run"):
        new_run(run.path, resume=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        new_run(tmp_path / "notes", resume=False)
    with pytest.raises(RecipeError, match="no run to resume"):
        new_run(tmp_path / "fresh", resume=True)
    assert not (tmp_path / "fresh").exists()
    assert new_run(tmp_path / "fresh", resume=False).path.is_dir()


def test_unfinished_files_are_swept_and_old_checkpoints_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (5, 10, 100000, 1000000):
        folder.checkpoint(step).mkdir(parents=True)
    (folder.checkpoints / ".step-000015.tmp").mkdir()
    (folder.path / ".results.json.1.tmp").write_text("half")
    folder.remove_leftovers()
    assert [p.name for p in folder.complete_checkpoints()] == ["step-000005", "step-000010", "step-100000", "step-1000000"]
    folder.remove_older_checkpoints(2)
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["step-100000", "step-1000000"]
    assert not list(folder.path.glob(".*tmp"))


def test_json_files_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": "é", "y": [1, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": "é", "y": [1, None]}
    write_text(tmp_path / "list.json", "[1]")
    with pytest.raises(FileError, match="JSON object"):
        read_json(tmp_path / "list.json")
    assert {"python", "threads", "versions"} <= environment().keys()
