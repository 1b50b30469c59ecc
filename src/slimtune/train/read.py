"""Read rows from files, folders and hub data sets, and say in which row of which file something is wrong.

The `datasets` library does the reading (memory-mapped, so data may be larger than memory). Only when it fails is the file
gone through once more, line by line, to find the row that a person has to correct.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError, SlimtuneError
from slimtune.train import hub
from slimtune.train.fetch import cache_dir
from slimtune.train.sources import DATA_SUFFIXES, builtin_data

if TYPE_CHECKING:
    from datasets import Dataset

    from slimtune.train.recipe import Recipe

SPLITS = ("train", "valid", "test")
_NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
_SAMPLE_SEED = 0  # not the recipe's seed: runs with different seeds must see the same rows, or they cannot be compared


@dataclass(frozen=True)
class Source:
    """The rows of one split as they were read, with the name to use for them in messages."""

    rows: Dataset
    name: str


def read_splits(recipe: Recipe) -> dict[str, Source]:
    """Read every split that a recipe names: "train", and "valid" and "test" where there are files for them.

    Raises:
        DataError: a file cannot be read, has no rows, or there is nothing to train on.
    """
    found: dict[str, Source] = {}
    files: dict[str, list[Path]] = {}
    if recipe.data is not None:
        path = builtin_data()[recipe.data.removeprefix("builtin:")] if recipe.data.startswith("builtin:") else Path(recipe.data)
        if path.is_dir():
            files = _files_of(path)
        elif path.is_file():
            files = {"train": [path]}
        else:
            found = _read_hub(recipe.data)
    for split, own in zip(SPLITS, (recipe.train_file, recipe.valid_file, recipe.test_file), strict=True):
        if own is not None:
            files[split] = [Path(own)]
            found.pop(split, None)
    found |= {split: read_files(paths) for split, paths in files.items()}
    if "train" not in found:
        raise DataError(
            "there are no training rows",
            where=str(recipe.data),
            hint=f"name a file train.jsonl, or give train_file; there is {sorted(found)}",
        )
    return found


def read_files(paths: list[Path]) -> Source:
    """Read one file, or several as one.

    Raises:
        DataError: a file cannot be read or has no rows.
    """
    from datasets import concatenate_datasets

    name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
    rows = [_read_file(path) for path in paths]
    return Source(rows[0] if len(rows) == 1 else concatenate_datasets(rows), name)


def hold_out(source: Source, fraction: float) -> tuple[Source, Source | None]:
    """Split off a share of the rows, the same ones every time; the second part is None if that is not even one row."""
    count = round(len(source.rows) * fraction)
    if count == 0:
        return source, None
    order = list(range(len(source.rows)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    rest, held = sorted(order[count:]), sorted(order[:count])
    return Source(source.rows.select(rest), source.name), Source(source.rows.select(held), f"{source.name} (held out)")


def sample(rows: Dataset, limit: int | None) -> Dataset:
    """Return at most `limit` rows, drawn the same way every time, in their order in the file."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(sorted(random.Random(_SAMPLE_SEED).sample(range(len(rows)), limit)))


def _files_of(folder: Path) -> dict[str, list[Path]]:
    """Return split -> files of a folder: train.jsonl, validation.csv, test-00000-of-00002.parquet, ..."""
    there = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in DATA_SUFFIXES)
    files: dict[str, list[Path]] = {}
    for split, names in _NAMES.items():
        hits = [p for p in there if p.stem in names or p.stem.startswith(tuple(f"{n}-" for n in names))]
        kinds = {p.suffix for p in hits}
        if len(kinds) > 1 or len({p.stem.split("-")[0] for p in hits}) > 1:
            raise DataError(
                f"several files could be the {split} split: {', '.join(p.name for p in hits)}",
                where=str(folder),
                hint=f"keep one, or name it with {split}_file",
            )
        if hits:
            files[split] = hits
    if "train" not in files and len(there) == 1:
        files["train"] = there
    if not there:
        raise DataError("the folder has no data files", where=str(folder), hint=f"put a train.jsonl in it (or {', '.join(DATA_SUFFIXES[1:])})")
    return files


def _read_file(path: Path) -> Dataset:
    import datasets

    options: dict[str, Any] = {}
    kind = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(path.suffix, "json")
    if kind == "csv":  # an answer "NA" or "null" is a word, not a missing value
        options = {"keep_default_na": False, "sep": "\t" if path.suffix == ".tsv" else ","}
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path))
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what is raised as well
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache_dir() / "datasets"), **options)
    except Exception as error:  # the readers raise whatever Arrow and pandas raise
        raise _explain(path, error) from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
    if len(rows) == 0:
        raise DataError("the file has no rows", where=str(path))
    return rows


def _read_hub(name: str) -> dict[str, Source]:
    import datasets

    hint = "give a file or a folder, or builtin:fine_foods"
    if not hub.reachable() and not hub.is_cached(name, "README.md", "dataset"):
        raise hub.unreachable(name, "data set", hint)
    try:
        whole = datasets.load_dataset(name)
    except Exception as error:
        raise hub.in_words(name, error, "data set", hint) from error
    found = {}
    for split, names in _NAMES.items():
        hit = next((n for n in names if n in whole), None)
        if hit is not None:
            found[split] = Source(whole[hit], f"{name} ({hit})")
    return found


def _explain(path: Path, error: Exception) -> SlimtuneError:
    """Find the row that a reader stumbled over."""
    if path.suffix == ".parquet":
        return DataError("this is not a sound parquet file", where=str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        row = path.read_bytes()[: wrong.start].count(b"\n") + 1
        return DataError(f"row {row} is not text in UTF-8", where=str(path), hint="save the file as UTF-8")
    except OSError as wrong:
        return DataError(f"cannot read the file: {wrong.strerror}", where=str(path))
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < (2 if path.suffix in {".csv", ".tsv"} else 1) or text.split() in (["[]"], ["[", "]"]):
        return DataError("the file has no rows", where=str(path))
    if path.suffix in {".csv", ".tsv"}:
        width = 0
        for number, fields in enumerate(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",")):
            width = width or len(fields)
            if fields and len(fields) != width:
                return DataError(
                    f"row {number} has {len(fields)} fields, the header has {width}",
                    where=str(path),
                    hint="put quotes around a text that holds the separator",
                )
    elif path.suffix == ".jsonl" or not text.lstrip().startswith("["):  # a .json file may be one list of rows
        problem = _bad_line(text)
        if problem:
            return DataError(problem, where=str(path), hint='one JSON object a line, such as {"prompt": "...", "completion": "..."}')
    first = str(error.__cause__ or error).strip().splitlines()[0][:300]
    return DataError(f"the file cannot be read as rows: {first}", where=str(path))


def _bad_line(text: str) -> str:
    """Return what is wrong with the first bad line of JSONL text, or ""."""
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"row {number} is not valid JSON: {error}"
        if not isinstance(row, dict):
            return f"row {number} is {_kind(row)}, not an object with named fields"
        for key, value in row.items():
            if value is None:
                continue
            kind, first = kinds.setdefault(key, (_kind(value), number))
            if kind != _kind(value):
                return f"row {number}: {key!r} is {_kind(value)}, but in row {first} it is {kind}"
    return ""


def _kind(value: Any) -> str:
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names[type(value)]
