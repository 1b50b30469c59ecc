"""What the arena has measured so far: one JSON line a cell, appended and flushed, so that a run goes on where it was stopped."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slimtune.core.errors import FileError

Key = tuple[str, str, str, str, float, int]  # task, kind ("trial" | "seed" | "cost"), library, name, learning rate, seed


class Store:
    """The file of one arena.

    Args:
        path: JSON lines; made if missing.

    Raises:
        FileError: a line of it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[Key, dict[str, Any]] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                cell = json.loads(line)
                self.cells[key_of(cell)] = cell
            except (json.JSONDecodeError, KeyError, TypeError):
                if number == self.count:  # the last line may have been cut off by a kill: it is measured again
                    continue
                raise FileError(f"line {number} cannot be read", where=str(path), hint="delete that line; its cell is measured again") from None

    def _lines(self) -> Iterator[str]:
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        lines = [line for line in text.split("\n") if line.strip()]
        self.count = len(lines)
        yield from lines

    def __contains__(self, key: Key) -> bool:
        return key in self.cells

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell, on disk before it counts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.is_file() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as f:
            f.write(("\n" if torn else "") + json.dumps(cell, sort_keys=True) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.cells[key_of(cell)] = cell


def key_of(cell: dict[str, Any]) -> Key:
    """Return what tells a cell from every other."""
    return (cell["task"], cell["kind"], cell["library"], cell["name"], float(cell["lr"]), int(cell["seed"]))


def code_version() -> dict[str, str]:
    """Return what a figure depends on: the code's version and commit, and the libraries'."""
    from slimtune.version import __version__

    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    out = {"slimtune": __version__, "commit": found.stdout.strip() or "unknown", "python": platform.python_version()}
    for package in ("torch", "transformers", "peft"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "-"
    return out
