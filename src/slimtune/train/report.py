"""report.html: one self-contained page about one run, drawn from the files of the run folder alone.

No script, no external request: styles are inline, pictures are data URIs. Every value is escaped by the template.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from slimtune.core.errors import FileError
from slimtune.core.visible import visible
from slimtune.train.figures import FIGURES, Figure, draw_figures
from slimtune.train.runs import RunFolder, read_json, write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut short by a kill is left out.

    Args:
        path: the file; a missing one has no rows.

    Raises:
        FileError: a line other than the last is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if i == len(lines) - 1:
                break
            raise FileError(f"line {i + 1} is damaged", where=str(path)) from e
    return rows


def size(n: float | None) -> str:
    """Bytes in plain words: 3_600_000 -> "3.6 MB"."""
    if n is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds in plain words: 200 -> "3 min 20 s"."""
    if seconds is None:
        return "–"
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def number(x: Any) -> str:
    """A figure for a table cell."""
    if isinstance(x, bool) or x is None:
        return {True: "yes", False: "no", None: "–"}[x]
    if isinstance(x, int):
        return f"{x:,}"
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 1e-3 and x else f"{x:,.3f}" if abs(x) < 100 else f"{x:,.0f}"
    if isinstance(x, (list, tuple)):
        return ", ".join(number(v) for v in x)
    return str(x)


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) rows; keys that were left empty are dropped."""
    rows: list[tuple[str, str]] = []
    for k, v in value.items():
        if isinstance(v, Mapping):
            rows += flatten(v, f"{prefix}{k}.")
        elif v is not None and v != []:
            rows.append((f"{prefix}{k}", str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else number(v)))
    return rows


def write_report(folder: RunFolder) -> Path:
    """Write figures/*.png and report.html of a finished run.

    Args:
        folder: a run with recipe.yaml, environment.json and results.json.

    Returns:
        The page.

    Raises:
        FileError: one of these files is missing or damaged.
    """
    results = read_json(folder.results)
    metrics = read_metrics(folder.metrics)
    figures = draw_figures(metrics, results, folder.figures)
    page = render(folder.read_recipe(), read_json(folder.environment), results, metrics, figures)
    write_text(folder.report, page)
    return folder.report


def render(
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
) -> str:
    """The page as text.

    Args:
        recipe: the resolved recipe.
        environment: environment.json.
        results: results.json.
        metrics: rows of metrics.jsonl.
        figures: the pictures to embed.
    """
    import jinja2
    import yaml

    source = resources.files("slimtune").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(size=size, duration=duration, number=number)
    pictures = [{"name": f.name, "caption": f.caption, "light": _data_uri(f.light), "dark": _data_uri(f.dark)} for f in figures]
    return env.from_string(source).render(
        results=results,
        cards=_cards(results),
        pictures={**dict.fromkeys(FIGURES), **{p["name"]: p for p in pictures}},
        settings=flatten(recipe),
        recipe_text=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        environment=flatten({k: v for k, v in environment.items() if k != "versions"}),
        versions=sorted(environment.get("versions", {}).items()),
        logged=len(metrics),
    )


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # what is marked as safe is the template's own


def _cards(results: Mapping[str, Any]) -> list[dict[str, str]]:
    training, adapter, model = results["training"], results["adapter"], results["model"]
    cards: list[dict[str, str]] = []
    if results["measures"]:
        m = results["measures"][0]
        before = f"{number(m['before'])} → " if m["before"] is not None else ""
        cards.append({"label": m["name"], "value": number(m["after"]), "note": f"{before}{number(m['after'])} on held-out examples"})
    cards += [
        {
            "label": "trained",
            "value": f"{adapter['percent']:.2f} %",
            "note": f"{adapter['trainable']:,} of {model['parameters']:,} parameters",
        },
        {"label": "result on disk", "value": size(adapter["bytes"]), "note": f"the model it adapts: {size(model['bytes'])}"},
        {"label": "time", "value": duration(training["seconds"]), "note": f"{training['steps']:,} steps"},
        {
            "label": "speed",
            "value": f"{training['tokens_per_second']:,.0f}",
            "note": f"tokens per second, {training['tokens']:,} tokens",
        },
        {
            "label": "peak memory",
            "value": size(training["peak_bytes"]),
            "note": "of the whole process, libraries and model included",
        },
    ]
    return cards


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
