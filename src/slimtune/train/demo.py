"""`slimtune demo`: the whole story on a real model and real reviews, through the same engine as every recipe."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.core.errors import RecipeError
from slimtune.train.baselines import majority, tfidf
from slimtune.train.engine import RunResult, train
from slimtune.train.load_recipe import load_recipe
from slimtune.train.quiet import quiet
from slimtune.train.recipe import Recipe
from slimtune.train.report import duration, size, write_report
from slimtune.train.runs import RunFolder, read_json, write_json, write_text
from slimtune.train.sources import ASSETS
from slimtune.train.verify import ROWS, exact_answers, toss_ups

RECIPE = ASSETS / "recipes" / "demo.yaml"
FULL_LR = 3e-5  # full fine-tuning diverges at an adapter's learning rate


def demo(model: str | None, compare: bool, out: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Train, measure, reload, merge, compare, report.

    Args:
        model: another model (any form a recipe takes); None for the packaged one.
        compare: also fine-tune every weight for as many steps.
        out: the run folder; an earlier demo there is replaced.
        settings: `key=value` settings that win over the packaged recipe.

    Returns:
        What summary.json holds.

    Raises:
        SlimtuneError: as `train`.
    """
    with quiet():
        return _demo(model, compare, out, settings)


def _demo(model: str | None, compare: bool, out: str, settings: Sequence[str]) -> dict[str, Any]:
    from slimtune.train.models import resolve_model

    folder = RunFolder(Path(out))
    overrides = [f"out={out}", *([f"model={model}"] if model else []), *settings]
    recipe = load_recipe(RECIPE, overrides)
    _make_room(folder)
    resolve_model(recipe.model, base=Path.cwd(), say=_say)  # fetching and converting is set-up: the clock starts after it
    began = time.perf_counter()
    _say(f"teaching {recipe.model.split('#')[-1]} to tell great reviews from others; recipe: {RECIPE}")
    result = train(recipe, say=_say)
    if result.before is None or result.after is None or result.after.accuracy is None:
        raise RecipeError("the demo needs held-out reviews with answers to choose from", where=str(RECIPE))

    baselines = _baselines(result)
    agree = _agreement(result)
    seconds = time.perf_counter() - began
    results = {**result.results, "baselines": baselines}
    if compare:
        results["comparison"] = _compare(result, recipe)
    write_json(folder.results, results)
    figures = {
        "accuracy_before": result.before.accuracy,
        "accuracy_after": result.after.accuracy,
        "baseline_tfidf": baselines[1]["accuracy"],
        "baseline_majority": baselines[0]["accuracy"],
        "trainable_parameters": results["adapter"]["trainable"],
        "adapter_bytes": results["adapter"]["bytes"],
        "seconds": round(seconds, 1),
        "peak_bytes": results["training"]["peak_bytes"],
        "predictions_agree": agree,
    }
    write_json(folder.summary, figures)
    write_report(folder)
    _show(results, figures, folder)
    return figures


def _make_room(folder: RunFolder) -> None:
    """Remove an earlier demo, and nothing else."""
    if folder.recipe.is_file() and folder.read_recipe().get("name") == "demo":
        shutil.rmtree(folder.path)


def _baselines(result: RunResult) -> list[dict[str, Any]]:
    from slimtune.train.data import read_rows

    # All training reviews, also those the model was not shown.
    everything = load_recipe(RECIPE).model_copy(update={"limit_train": None})
    rows = read_rows(everything).splits
    pairs = [(r["text"], r["label"]) for r in [*rows["train"], *rows.get("valid", [])]]
    test = [(r["text"], r["label"]) for r in result.job.held_out_words()]
    return [
        {"name": "always the larger class", "accuracy": majority([y for _, y in pairs], [y for _, y in test])},
        {"name": f"TF-IDF + logistic regression ({len(pairs):,} reviews)", "accuracy": tfidf(pairs, test)},
    ]


def _agreement(result: RunResult) -> bool:
    """Live, reloaded and merged give the same answers (the latter two in a fresh process)."""
    assert result.after is not None
    n = min(ROWS, result.after.examples)
    close = toss_ups(result.after, n)
    clear = [i for i in range(n) if i not in set(close)]
    _say(f"in a fresh process: loading the adapter, merging it, comparing {n} answers (the {len(close)} closest calls in float32)")
    file = result.folder.path / ".answers.json"
    write_json(file, {"rows": clear, "close": close})
    subprocess.run([sys.executable, "-m", "slimtune.train.verify", str(result.folder.path), str(file)], check=True)
    found = read_json(file)
    file.unlink()
    live = [result.after.predictions[i] for i in clear] + exact_answers(result.job, close)
    reloaded = found["reloaded"] + found["reloaded_exact"]
    merged = found["merged"] + found["merged_exact"]
    _say(f"live and reloaded: {_same(live, reloaded)}; live and merged: {_same(live, merged)}")
    return bool(live == reloaded == merged)


def _same(a: list[int], b: list[int]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True)):,} of {len(a):,} answers equal"


def _compare(result: RunResult, recipe: Recipe) -> dict[str, Any]:
    """Full fine-tuning of the same model with as many steps on the same rows, in a process of its own (for its own peak memory)."""
    steps = result.results["training"]["steps"]
    base = result.folder.path / "compare"
    update = {"method": "full", "options": {}, "lr": FULL_LR, "max_steps": steps, "name": "full", "out": str(base / "run")}
    write_text(base / "recipe.yaml", recipe.model_copy(update=update).dump())
    _say(f"comparing: full fine-tuning, {steps} steps")
    code = "import sys; from slimtune.cli import train; train.run(sys.argv[1], [], resume=False)"
    subprocess.run([sys.executable, "-c", code, str(base / "recipe.yaml")], check=True, stdout=subprocess.DEVNULL)
    full = read_json(base / "run" / "results.json")
    ours = result.results
    columns = [("LoRA", ours), ("all weights", full)]

    def accuracy(r: dict[str, Any]) -> float:
        return float(next(m["after"] for m in r["measures"] if m["name"] == "accuracy"))

    return {
        "title": "LoRA beside full fine-tuning",
        "columns": [name for name, _ in columns],
        "rows": [
            ["accuracy on held-out reviews", *(f"{accuracy(r):.3f}" for _, r in columns)],
            ["trained parameters", *(f"{r['adapter']['trainable']:,}" for _, r in columns)],
            ["training time", *(duration(r["training"]["seconds"]) for _, r in columns)],
            ["peak memory of the process", *(size(r["training"]["peak_bytes"]) for _, r in columns)],
            ["result on disk", *(size(r["adapter"]["bytes"]) for _, r in columns)],
        ],
        "figures": [
            {
                "name": name,
                "accuracy": accuracy(r),
                "seconds": r["training"]["seconds"],
                "peak_bytes": r["training"]["peak_bytes"],
                "checkpoint_bytes": r["adapter"]["bytes"],
            }
            for name, r in columns
        ],
        "note": f"The same model, reviews and {steps} steps; each with a learning rate that suits it. All weights are kept in float32 "
        "while they train, as their steps are too small for bfloat16, and are saved in bfloat16.",
    }


def _show(results: dict[str, Any], figures: dict[str, Any], folder: RunFolder) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    console.print()
    for s in results["samples"]:
        text = s["prompt"].replace("\n", " ")
        console.print(Text(text if len(text) <= 300 else text[:220] + " ... " + text[-70:]))
        right = {k: "green" if s[k] == s["expected"] else "red" for k in ("before", "after")}
        console.print(
            Text.assemble(
                "  expected ", (s["expected"], "bold"), "   before ", (s["before"], right["before"]), "   after ", (s["after"], right["after"]), "\n"
            )
        )
    table = Table(title=f"accuracy on {results['evaluated']:,} reviews it has not seen", title_justify="left", show_header=False)
    table.add_column("", min_width=44)
    table.add_column("", justify="right")
    for b in results["baselines"]:
        table.add_row(b["name"], f"{b['accuracy']:.3f}")
    table.add_row("the model before training", f"{figures['accuracy_before']:.3f}")
    table.add_row("the model with its adapter", Text(f"{figures['accuracy_after']:.3f}", "bold"))
    console.print(table)
    if results["comparison"]:
        versus = Table(title=results["comparison"]["title"], title_justify="left")
        for i, column in enumerate(["", *results["comparison"]["columns"]]):
            versus.add_column(column, justify="right" if i else "left")
        for row in results["comparison"]["rows"]:
            versus.add_row(*row)
        console.print(versus)
    a, t, m = results["adapter"], results["training"], results["model"]
    print(
        f"trained {a['trainable']:,} of {m['parameters']:,} parameters ({a['percent']:.2f} %) in {duration(t['seconds'])}, "
        f"{t['tokens_per_second']:,.0f} tokens/s, peak memory {size(t['peak_bytes'])}"
    )
    print(f"adapter {size(a['bytes'])}, model {size(m['bytes'])}; report: {folder.report}")
    same = "the same answers live, reloaded and merged" if figures["predictions_agree"] else "ANSWERS DIFFER between live, reloaded and merged"
    print(
        f"accuracy {figures['accuracy_before']:.3f} -> {figures['accuracy_after']:.3f} (TF-IDF {figures['baseline_tfidf']:.3f}, majority "
        f"{figures['baseline_majority']:.3f}), {figures['trainable_parameters']:,} parameters, {figures['adapter_bytes']:,} bytes, "
        f"{figures['seconds']:.0f} s, peak {figures['peak_bytes']:,} bytes, {same}",
        flush=True,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
