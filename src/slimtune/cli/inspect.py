"""slimtune inspect data RECIPE, and slimtune inspect ADAPTER"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import RecipeError

if TYPE_CHECKING:
    from rich.text import Text


def run(kind: str, rest: list[str], rows: int, split: str) -> None:
    """Show a recipe's examples with their loss mask, or the contents of an adapter's folder.

    Args:
        kind: "data" or "adapter".
        rest: the recipe and its overrides; or the adapter's folder.
        rows: how many examples to show.
        split: of which split.

    Raises:
        SlimtuneError: the recipe, the data or the adapter is not sound.
    """
    if kind == "data":
        if not rest:
            raise RecipeError("inspect data needs a recipe", hint="slimtune inspect data RECIPE.yaml")
        show_data(Path(rest[0]), rest[1:], rows, split)
    elif len(rest) != 1:
        raise RecipeError(
            f"inspect takes one adapter folder, got {len(rest)} words",
            hint="slimtune inspect data RECIPE, or slimtune inspect DIR",
        )
    else:
        from slimtune.cli.inspect_adapter import show_adapter

        show_adapter(Path(rest[0]))


def show_data(path: Path, overrides: list[str], count: int, split: str) -> None:
    """Print examples token by token; tokens with loss are green (and in brackets where there is no colour)."""
    from rich.console import Console
    from rich.text import Text

    from slimtune.train.data import read_rows, tokenise_split
    from slimtune.train.load_recipe import load_recipe
    from slimtune.train.models import decide_task, load_config, load_tokenizer, max_positions, resolve_model
    from slimtune.train.new_tokens import extend_tokenizer
    from slimtune.train.plain import plain
    from slimtune.train.problems import PROBLEMS

    console = Console(highlight=False, soft_wrap=True)
    recipe = load_recipe(path, overrides)
    read = read_rows(recipe)
    if split not in read.splits:
        raise RecipeError(f"there is no {split!r} split", where=str(path), hint=f"there is {', '.join(read.splits)}")
    resolved = resolve_model(recipe.model, say=lambda text: console.print(text, style="dim", markup=False))
    config, tokenizer = load_config(resolved), load_tokenizer(resolved)
    extend_tokenizer(recipe, tokenizer)
    task = decide_task(recipe.task, config, read.format)
    # Only what is shown is tokenised: this is quick with a million rows too.
    examples, _, notes = tokenise_split(read, split, recipe, tokenizer, task, max_positions(config), count)
    for i, example in enumerate(examples):
        ids = list(example["input_ids"])
        labels = list(example["labels"]) if "labels" in example else [-100] * len(ids)
        learned = sum(label != -100 for label in labels)
        title = f"{split} example {i + 1}: {len(ids)} tokens, " + (
            f"{learned} with loss" if task == "causal_lm" else f"label {plain(PROBLEMS[read.format].words(example['label'], read.labels))}"
        )
        console.print(Text(title, style="bold"))
        console.print(paint(tokenizer, ids, labels, plain=console.color_system is None))
        console.print()
    legend = Text.assemble(("green", "black on green"), " = with loss, ", ("grey", "dim"), " = read only, | parts the tokens, ⏎ is a line break")
    console.print(legend if console.color_system else Text("[...] = with loss, the rest is read only; | parts the tokens, ⏎ is a line break"))
    for note in [*read.notes, *notes]:
        console.print(f"note: {note}", markup=False)


def paint(tokenizer: Any, ids: list[int], labels: list[int], plain: bool) -> Text:
    """Return the tokens as coloured text, one colour for each side of the loss mask.

    Args:
        tokenizer: to turn ids into text.
        ids, labels: of one example; a label of -100 is masked.
        plain: mark by brackets as well, for output without colour.
    """
    from rich.text import Text

    from slimtune.train.plain import plain as shown

    text = Text()
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        learned = label != -100
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    for learned, run in runs:
        words = [shown(tokenizer.decode([token]).replace("\n", "⏎")) for token in run]
        if plain:
            body = "|".join(words)
            text.append(f"[{body}]" if learned else body)
            continue
        for i, word in enumerate(words):
            if i:
                text.append("|", style="green" if learned else "bright_black")
            text.append(word, style="black on green" if learned else "dim")
    return text
