"""slimtune check RECIPE [KEY=VALUE ...]"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimtune.core.report import Report
    from slimtune.train.prepare import Prepared
    from slimtune.train.recipe import Recipe


def run(path: Path, overrides: list[str]) -> None:
    """Validate a recipe and its data, build the model without weights, attach, and show the plan; writes nothing.

    Args:
        path: the recipe.
        overrides: `key=value` settings that win over the file.

    Raises:
        SlimtuneError: whatever would stop the training before its first step.
    """
    from rich.console import Console

    from slimtune.core.visible import visible
    from slimtune.train.load_recipe import load_recipe
    from slimtune.train.needs import check_packages
    from slimtune.train.precision import pick_dtype
    from slimtune.train.prepare import prepare
    from slimtune.train.runs import check_out

    recipe = load_recipe(path, overrides)
    check_packages(recipe)
    check_out(Path(str(recipe.out)), resume=False)
    console = Console(highlight=False, soft_wrap=True)
    prepared = prepare(recipe, empty=True, say=lambda text: console.print(text, style="dim", markup=False))
    report = attach_empty(prepared, recipe)
    parameters = sum(p.numel() for p in prepared.model.parameters()) if report is None else 0

    def line(name: str, text: str) -> None:
        console.print(f"[bold cyan]{name:<8}[/]", end="")
        console.print(visible(text), markup=False)

    dtype = str(pick_dtype(recipe.dtype)).removeprefix("torch.")
    line(
        "model",
        f"{recipe.model}: {prepared.model.config.model_type}, {dtype}" + ("" if recipe.quantize == "none" else f", {recipe.quantize}"),
    )
    line("task", prepared.task.replace("_", " "))
    if report is None:
        line("method", f"full fine-tuning: all {parameters:,} parameters train (100 %)")
    else:
        line("method", str(report).replace("\n", "\n        "))
    for name, text in data_lines(prepared):
        line(name, text)
    line("train", steps_text(recipe, prepared))
    for text in memory_lines(prepared, recipe, report):
        line("", text)
    line(
        "output",
        f"{recipe.out}: recipe.yaml, metrics.jsonl, checkpoints/, {'model' if report is None else 'adapter'}/, "
        "results.json, summary.json, environment.json, report.html, figures/",
    )
    console.print("the recipe is sound; nothing was written", style="green")


def memory_lines(prepared: Prepared, recipe: Recipe, report: Report | None) -> list[str]:
    """Return what each setting of `memory` keeps and costs, measured on a few blocks."""
    from slimtune.train.method_options import build_spec
    from slimtune.train.quiet import quiet
    from slimtune.train.tradeoff import lines, measure

    with quiet():
        return lines(measure(prepared, recipe, build_spec(recipe, prepared.task, prepared.new), report), recipe.memory)


def attach_empty(prepared: Prepared, recipe: Recipe) -> Report | None:
    """Attach the recipe's method to the model on the meta device, skipping initialisers; None for full fine-tuning.

    Raises:
        SlimtuneError: no module matches, or one cannot carry the op.
    """
    from slimtune.core.attach import build
    from slimtune.core.placing import put_to_use
    from slimtune.core.report import make_report
    from slimtune.train.method_options import build_spec

    spec = build_spec(recipe, prepared.task, prepared.new)
    if spec is None:
        return None
    model = prepared.model.requires_grad_(False)
    adapter = build(model, spec, recipe.name or "default", None, blank=True)
    put_to_use(model, adapter)
    return make_report(model, adapter)


def data_lines(prepared: Prepared) -> list[tuple[str, str]]:
    """Return (heading, text) lines about the rows."""
    from slimtune.train.data_notes import answers_text
    from slimtune.train.tables import token_counts

    data = prepared.data
    lines = []
    for name, rows in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if rows is not None:
            lengths = sorted(token_counts(rows))
            lines.append(f"{name} {len(rows):,} rows, {sum(lengths):,} tokens (median {lengths[len(lengths) // 2]}, longest {lengths[-1]})")
    lines += [text for text in [answers_text(data, prepared.task)] if text]
    lines += [f"note: {note}" for note in data.notes]
    return [("data", f"format {data.format}"), *(("", text) for text in lines)]


def count_steps(recipe: Recipe, rows: int, processes: int = 1) -> int:
    """Return the number of optimiser steps."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    batches = math.ceil(rows / (recipe.batch_size * processes))
    return math.ceil(recipe.epochs * math.ceil(batches / recipe.accumulate))


def steps_text(recipe: Recipe, prepared: Prepared) -> str:
    """Return one line about steps, tokens and the learning rate."""
    from slimtune.train.tables import token_counts

    rows = len(prepared.data.train)
    steps = count_steps(recipe, rows)
    tokens = sum(token_counts(prepared.data.train))
    seen = steps * recipe.batch_size * recipe.accumulate / rows
    warmup = int(recipe.warmup) if recipe.warmup >= 1 else round(recipe.warmup * steps)
    return (
        f"{steps:,} steps of {recipe.batch_size * recipe.accumulate} rows = {seen:.3g} epoch{'' if seen == 1 else 's'}, "
        f"about {round(tokens * seen):,} tokens; lr {recipe.lr:g}, {recipe.schedule}, {warmup} steps of warm-up"
    )
