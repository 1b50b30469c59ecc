"""slimtune inspect ADAPTER: method, rank, modules, bytes, fingerprint and norms, read from the files alone; no model is needed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

    from slimtune.files.container import TensorFile

_BLOCK = re.compile(r"\.(\d+)\.")


def show_adapter(folder: Path) -> None:
    """Print what an adapter's folder (or the run folder above it) holds.

    Raises:
        FileError: there is no adapter.
        FormatError: its files are damaged, or a pickle.
    """
    from rich.console import Console
    from rich.table import Table

    from slimtune.files.adapter import read

    if folder.is_file():
        raise FileError("name the adapter's folder, not a file in it", where=str(folder), hint=f"slimtune inspect {folder.parent}")
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    file, about, config, notes = read(folder, frozenset())
    tensors = {name: file.tensor(name) for name in file.entries}
    console = Console(highlight=False, soft_wrap=True)
    console.print(str(folder), style="bold", markup=False)
    for name, text in facts(file, tensors, about, config or {}):
        console.print(f"  [cyan]{name:<12}[/] ", end="")
        console.print(text, markup=False)
    for note in notes:
        console.print(f"  note: {note}", markup=False)
    for role, (layers, modules, norms) in norm_tables(tensors).items():
        console.print(f"\nnorm of {role}, by block", style="bold", markup=False)  # as a table's title it would wrap at the table's width
        table = Table(box=None, pad_edge=False)
        table.add_column("block")
        for module in modules:
            table.add_column(module, justify="right", overflow="fold")
        for layer in layers:
            table.add_row(layer, *(f"{norms[layer, m]:.3g}" if (layer, m) in norms else "" for m in modules))
        console.print(table, soft_wrap=False)


def facts(file: TensorFile, tensors: Mapping[str, Tensor], about: dict[str, Any] | None, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) lines: from our own metadata where there is any, else from the config of a foreign file."""
    lines: list[tuple[str, str]] = []
    if about is not None:
        places = about["places"]
        settings = {key: value for key, value in about["spec"].items() if key != "method" and value not in (None, [], {}, False)}
        ranks = Counter(place["settings"]["r"] for place in places if "r" in place["settings"])
        lines += [("name", about["name"]), ("method", about["spec"]["method"])]
        if ranks:
            lines.append(("rank", ", ".join(f"{r}" if len(ranks) == 1 else f"{r} ({n} modules)" for r, n in sorted(ranks.items()))))
        lines.append(("settings", ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items())))
        paths = [place["path"] for place in places]
        base = hashlib.sha256(json.dumps(about["fingerprint"], sort_keys=True).encode()).hexdigest()[:16]
        lines.append(("fingerprint", f"{base} (of the base model it was trained on)"))
    else:
        lines.append(("method", f"{str(config.get('peft_type', 'unknown')).lower()} (a file of another library)"))
        shown = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
        lines += [(name, json.dumps(config[key])) for key, name in shown.items() if config.get(key) is not None]
        paths = sorted({".".join(name.split(".")[:-2]).removeprefix("base_model.model.") for name in tensors})
        lines.append(("fingerprint", "none: only slimtune's own files say which base they belong to"))
    if config.get("base_model_name_or_path"):
        lines.append(("base model", str(config["base_model_name_or_path"])))
    groups = Counter(".".join("*" if part.isdigit() else part for part in path.split(".")) or "(the model)" for path in paths)
    lines.append(("modules", f"{len(paths)}: " + ", ".join(f"{count} x {name}" for name, count in groups.items())))
    numbers = sum(t.numel() for t in tensors.values())
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    lines.append(("tensors", f"{len(tensors)}, {numbers:,} numbers, {dtypes}"))
    lines.append(("bytes", f"{file.path.stat().st_size:,} ({file.path.name})"))
    lines.append(("sha256", hashlib.sha256(file.path.read_bytes()).hexdigest()))
    return lines


Norms = dict[tuple[str, str], float]


def norm_tables(tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[str], list[str], Norms]]:
    """Return role -> (blocks, modules, Frobenius norm by block and module); a role is a tensor's last name, such as lora_A."""
    squares: dict[str, Norms] = {}
    for key, tensor in tensors.items():
        parts = [part for part in key.split(".") if part not in {"weight", "default"}]
        found = _BLOCK.search(key)
        at = (found[1] if found else "-", parts[-2] if len(parts) > 1 else "-")
        norms = squares.setdefault(parts[-1], {})
        norms[at] = norms.get(at, 0.0) + float(tensor.double().pow(2).sum())
    tables = {}
    for role, norms in sorted(squares.items()):
        blocks = sorted({block for block, _ in norms}, key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0))
        tables[role] = (blocks, sorted({module for _, module in norms}), {at: value**0.5 for at, value in norms.items()})
    return tables
