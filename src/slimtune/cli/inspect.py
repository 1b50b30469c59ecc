"""slimtune inspect data RECIPE, and slimtune inspect ADAPTER"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import FileError, FormatError, RecipeError

if TYPE_CHECKING:
    from rich.text import Text

_LAYER = re.compile(r"\.(\d+)\.")


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
        show_adapter(Path(rest[0]))


def show_data(path: Path, overrides: list[str], count: int, split: str) -> None:
    """Print examples token by token; tokens with loss are green (and in brackets where there is no colour)."""
    from rich.console import Console
    from rich.text import Text

    from slimtune.train.data import read_rows, tokenise_split
    from slimtune.train.load_recipe import load_recipe
    from slimtune.train.models import decide_task, load_config, load_tokenizer, max_positions, resolve_model

    console = Console(highlight=False, soft_wrap=True)
    recipe = load_recipe(path, overrides)
    read = read_rows(recipe)
    if split not in read.splits:
        raise RecipeError(f"there is no {split!r} split", where=str(path), hint=f"there is {', '.join(read.splits)}")
    resolved = resolve_model(recipe.model, say=lambda text: console.print(text, style="dim", markup=False))
    config, tokenizer = load_config(resolved), load_tokenizer(resolved)
    task = decide_task(recipe.task, config, read.format)
    # Only what is shown is tokenised: this is quick with a million rows too.
    examples, _, notes = tokenise_split(read, split, recipe, tokenizer, task, max_positions(config), count)
    for i, example in enumerate(examples):
        ids = list(example["input_ids"])
        labels = list(example["labels"]) if "labels" in example else [-100] * len(ids)
        learned = sum(label != -100 for label in labels)
        title = f"{split} example {i + 1}: {len(ids)} tokens, " + (
            f"{learned} with loss" if task == "causal_lm" else f"label {read.labels[example['label']]}"
        )
        console.print(Text(title, style="bold"))
        console.print(paint(tokenizer, ids, labels, plain=console.color_system is None))
        console.print()
    legend = Text.assemble(("green", "black on green"), " = with loss, ", ("grey", "dim"), " = read only, | parts the tokens, ⏎ is a line break")
    console.print(legend if console.color_system else Text("[...] = with loss, the rest is read only; | parts the tokens, ⏎ is a line break"))
    for note in notes:
        console.print(f"note: {note}", markup=False)


def paint(tokenizer: Any, ids: list[int], labels: list[int], plain: bool) -> Text:
    """Return the tokens as coloured text, one colour for each side of the loss mask.

    Args:
        tokenizer: to turn ids into text.
        ids, labels: of one example; a label of -100 is masked.
        plain: mark by brackets as well, for output without colour.
    """
    from rich.text import Text

    text = Text()
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        learned = label != -100
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    for learned, run in runs:
        words = [tokenizer.decode([token]).replace("\n", "⏎") for token in run]
        if plain:
            body = "|".join(words)
            text.append(f"[{body}]" if learned else body)
            continue
        for i, word in enumerate(words):
            if i:
                text.append("|", style="green" if learned else "bright_black")
            text.append(word, style="black on green" if learned else "dim")
    return text


def show_adapter(folder: Path) -> None:
    """Print what an adapter's folder holds, read straight from its safetensors file; no model is needed."""
    import hashlib

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    file, tensors, header, config = read_adapter(folder)
    size = file.stat().st_size
    console.print(f"[bold]{folder}[/]", soft_wrap=True)
    numbers = sum(t.numel() for t in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    facts = {
        "method": str(config.get("method") or config.get("peft_type") or "unknown").lower(),
        "rank": config.get("r"),
        "alpha": config.get("alpha", config.get("lora_alpha")),
        "targets": config.get("targets", config.get("target_modules")),
        "base model": config.get("base_model_name_or_path"),
        "tensors": f"{len(tensors)}, {numbers:,} numbers, {dtypes}",
        "file": f"{file.name}, {size:,} bytes",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **{f"header: {key}": value for key, value in header.items() if key != "format" and len(value) <= 200},
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"  [cyan]{name:<12}[/] ", end="")
            console.print(value if isinstance(value, str) else json.dumps(value), markup=False, soft_wrap=True)
    table = Table(title="norm of each kind of tensor, by layer", title_justify="left", box=None, pad_edge=False)
    layers, kinds, norms = norm_table(tensors)
    table.add_column("layer")
    for kind in kinds:
        table.add_column(kind, justify="right", overflow="fold")
    for layer in layers:
        table.add_row(layer, *(f"{norms[layer, kind]:.3g}" if (layer, kind) in norms else "" for kind in kinds))
    console.print(table)


def norm_table(tensors: dict[str, Any]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Return (layers, kinds, norms): the Frobenius norm of all tensors of a kind (module and role) in a layer."""
    squares: dict[tuple[str, str], float] = {}
    for key, tensor in tensors.items():
        found = _LAYER.search(key)
        layer = found[1] if found else "-"
        tail = key[found.end() :] if found else key
        parts = [p for p in tail.split(".") if p not in {"weight", "default", "base_model", "model", "self_attn", "mlp", "attention"}]
        at = (layer, ".".join(parts[-2:]))
        squares[at] = squares.get(at, 0.0) + float(tensor.double().pow(2).sum())
    layers = sorted({layer for layer, _ in squares}, key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0))
    return layers, sorted({kind for _, kind in squares}), {at: value**0.5 for at, value in squares.items()}


def read_adapter(folder: Path) -> tuple[Path, dict[str, Any], dict[str, str], dict[str, Any]]:
    """Return (file, tensors, header, config) of an adapter's folder.

    Raises:
        FileError: there is no adapter in it.
        FormatError: it is damaged, or a pickle.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.exists():
        raise FileError("there is no such folder", where=str(folder), hint="slimtune inspect RUN/adapter, or slimtune inspect data RECIPE")
    if folder.is_file():
        raise FileError("name the adapter's folder, not a file in it", where=str(folder), hint=f"slimtune inspect {folder.parent}")
    files = sorted(folder.glob("*.safetensors"))
    file = folder / "adapter_model.safetensors"
    if file not in files:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise FormatError("the adapter is a pickle, which is not opened", where=str(folder / pickles[0]), hint="save it as safetensors")
        raise FileError("there is no adapter in this folder", where=str(folder), hint="it should hold adapter_model.safetensors")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
            header = dict(opened.metadata() or {})
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except SafetensorError as error:
        raise FormatError(f"the file is damaged: {error}", where=str(file)) from error
    except FileNotFoundError:
        raise FileError("adapter_config.json is missing", where=str(folder)) from None
    except (ValueError, OSError) as error:
        raise FormatError(f"adapter_config.json cannot be read: {error}", where=str(folder)) from error
    if not isinstance(config, dict):
        raise FormatError("adapter_config.json does not hold an object", where=str(folder))
    return file, tensors, header, config
