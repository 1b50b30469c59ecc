"""Where a recipe's rows come from: files, folders (of splits, or of parts), hub data sets; and which of them are held out.

Nothing is read here but the first rows, which tell the format; `normalise` goes through a source once, row by row.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train import hub
from slimtune.train.row_files import Row, rows_of_file, rows_of_table
from slimtune.train.sources import DATA_SUFFIXES, builtin_data, data_kind, looks_like_path

if TYPE_CHECKING:
    from datasets import Dataset

    from slimtune.train.recipe import Recipe

SPLITS = ("train", "valid", "test")
HEAD = 1_000  # rows that tell the format
_NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
_SAMPLE_SEED = 0  # not the recipe's seed: runs with different seeds must see the same rows, or they cannot be compared
_Rows = Callable[[], Iterator[tuple[int, Row]]]


@dataclass(frozen=True)
class Source:
    """The rows of one split as they are read.

    Attributes:
        name: to use in messages.
        parts: (name, function that yields number and row) of each file.
        head: the first rows.
        columns: the keys of these.
        untyped: every value is text because the file has no types (CSV).
        notes: what a person should know about them.
    """

    name: str
    parts: tuple[tuple[str, _Rows], ...]
    head: tuple[Row, ...]
    columns: tuple[str, ...]
    untyped: bool = False
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        """Yield (place, row): "row 3", or "part_2.jsonl, row 3" where there are several files."""
        for name, rows in self.parts:
            before = f"{name}, " if len(self.parts) > 1 else ""
            for number, row in rows():
                yield f"{before}row {number}", row


def read_splits(recipe: Recipe, needed: str = "train") -> dict[str, Source]:
    """Find every split that a recipe names: "train", and "valid" and "test" where there are files for them.

    Args:
        recipe: the recipe.
        needed: the split that must be there; "" if any will do.

    Raises:
        DataError: a file cannot be read, has no rows, or the split that is needed is not there.
    """
    found: dict[str, Source] = {}
    files: dict[str, list[Path]] = {}
    left: list[str] = []
    own_files = dict(zip(SPLITS, (recipe.train_file, recipe.valid_file, recipe.test_file), strict=True))
    if recipe.data is not None:
        path = builtin_data()[recipe.data.removeprefix("builtin:")] if recipe.data.startswith("builtin:") else Path(recipe.data)
        if path.is_dir():
            files, left = _files_of(path, {s for s, own in own_files.items() if own is not None})
        elif path.is_file():
            files = {"train": [path]}
        elif looks_like_path(recipe.data):
            raise _gone(path)
        else:
            found = _read_hub(recipe.data)
    for split, own in own_files.items():
        if own is not None:
            if not Path(own).is_file():
                raise _gone(Path(own))
            files[split] = [Path(own)]
            found.pop(split, None)
    found |= {split: read_files(paths) for split, paths in files.items()}
    if left and "train" in found:
        found["train"] = replace(found["train"], notes=(f"files that are no split and are not read: {', '.join(left)}",))
    if needed and needed not in found:
        raise DataError(
            f"there are no {'training' if needed == 'train' else needed} rows",
            where=str(recipe.data),
            hint=f"name a file {needed}.jsonl, or give {needed}_file; there is {', '.join(sorted(found)) or 'no split'}",
        )
    return found


def read_files(paths: list[Path]) -> Source:
    """Return the rows of one file, or of several as one.

    Raises:
        DataError: a file cannot be read or has no rows.
    """
    parts = tuple((path.name, partial(rows_of_file, path)) for path in paths)
    name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
    for path, (_, rows) in zip(paths, parts, strict=True):
        if next(iter(rows()), None) is None:
            raise DataError("the file has no rows", where=str(path))
    return _source(name, parts, untyped=all(data_kind(path) in {"csv", "tsv"} for path in paths))


def hold_out(rows: Dataset, fraction: float) -> tuple[Dataset, Dataset | None]:
    """Split off a share of the rows, the same ones every time; the second part is None if that is not even one row."""
    count = round(len(rows) * fraction)
    if count == 0:
        return rows, None
    order = list(range(len(rows)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    return rows.select(sorted(order[count:])), rows.select(sorted(order[:count]))


def sample(rows: Dataset, limit: int | None) -> Dataset:
    """Return at most `limit` rows, drawn the same way every time, in their order in the file."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(sorted(random.Random(_SAMPLE_SEED).sample(range(len(rows)), limit)))


def _source(name: str, parts: tuple[tuple[str, _Rows], ...], untyped: bool = False) -> Source:
    head = tuple(row for _, rows in parts[:1] for _, row in itertools.islice(rows(), HEAD))
    return Source(name, parts, head, tuple(dict.fromkeys(key for row in head for key in row)), untyped)


def _gone(path: Path) -> DataError:
    near = sorted(p.name for p in path.parent.iterdir() if data_kind(p)) if path.parent.is_dir() else []
    there = f"; in that folder: {', '.join(near[:5])}" if near else ""
    return DataError(
        f"the data are no longer there{there}",
        where=str(path),
        hint="put them back, or name where they are now: `slimtune eval RUN --data FILE`, `slimtune train RECIPE data=FILE`",
    )


def _files_of(folder: Path, named: set[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return (split -> files of a folder, files of no split): train.jsonl, validation.csv, test-00000-of-00002.parquet, ...; or parts of one.

    Args:
        folder: where to look.
        named: splits that the recipe names a file for, so that nothing here is needed for them.
    """
    there = sorted(p for p in folder.iterdir() if p.is_file() and data_kind(p) is not None)
    files: dict[str, list[Path]] = {}
    for split, names in _NAMES.items():
        hits = [p for p in there if _stem(p) in names or _stem(p).startswith(tuple(f"{n}-" for n in names))]
        if split not in named and (len({data_kind(p) for p in hits}) > 1 or len({_stem(p).split("-")[0] for p in hits}) > 1):
            raise DataError(
                f"several files could be the {split} split: {', '.join(p.name for p in hits)}",
                where=str(folder),
                hint=f"keep one, or name it with {split}_file",
            )
        if hits:
            files[split] = hits
    if not there:
        raise DataError("the folder has no data files", where=str(folder), hint=f"put a train.jsonl in it (or {', '.join(DATA_SUFFIXES[1:])})")
    rest = [p for p in there if p not in itertools.chain(*files.values())]
    if "train" not in files and rest and "train" not in named:
        if len({data_kind(p) for p in rest}) > 1:
            raise DataError(
                f"these files are of several kinds, so they are no parts of one data set: {', '.join(p.name for p in rest[:5])}",
                where=str(folder),
                hint="name the one to train on with train_file",
            )
        files["train"] = rest
    return files, [p.name for p in rest if p not in files.get("train", [])]


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _read_hub(name: str) -> dict[str, Source]:
    import datasets

    hint = "give a file or a folder, or builtin:fine_foods"
    if not hub.reachable() and not hub.is_cached(name, "README.md", "dataset"):
        raise hub.unreachable(name, "data set", hint)
    try:
        whole: Any = datasets.load_dataset(name)
    except Exception as error:
        raise hub.in_words(name, error, "data set", hint) from error
    found = {}
    for split, names in _NAMES.items():
        hit = next((n for n in names if n in whole), None)
        if hit is not None:
            title = f"{name} ({hit})"
            found[split] = _source(title, ((title, partial(rows_of_table, whole[hit])),))
    return found
