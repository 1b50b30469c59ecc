"""Rows to an Arrow table: in memory while it is small, in a file in the cache (memory-mapped) when it is not.

Cost: one batch of 1,000 rows as Python objects, whatever the length of the table; tokens take 4 bytes each.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.train.fetch import cache_dir

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH = 1_000  # rows
IN_MEMORY = 64 * 2**20  # bytes
_STALE = 7 * 24 * 3600  # seconds; files that a killed process left behind


def write_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Dataset:
    """Return the rows as a data set; they are taken one by one, and only a batch of them is in memory as Python objects.

    Args:
        rows: one mapping per row, with the names of the schema.
        schema: names and types of the columns.
    """
    import pyarrow as pa
    from datasets import Dataset

    small: list[pa.RecordBatch] = []
    held = 0
    path: Path | None = None
    writer: pa.RecordBatchStreamWriter | None = None
    try:
        for batch in _batches(rows, schema):
            if writer is None and held + batch.nbytes > IN_MEMORY:
                path = _new_file()
                writer = pa.ipc.new_stream(str(path), schema)
                for earlier in small:
                    writer.write_batch(earlier)
                small = []
            if writer is not None:
                writer.write_batch(batch)
            else:
                small.append(batch)
                held += batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    if path is not None:
        return Dataset.from_file(str(path))
    return Dataset(pa.Table.from_batches(small, schema=schema))


def token_counts(dataset: Dataset) -> list[int]:
    """Return the number of tokens of each row, counted in the table (no list of tokens is made)."""
    import pyarrow.compute as pc

    column = dataset.with_format("arrow")[:]["input_ids"] if len(dataset) and dataset._indices is not None else dataset.data["input_ids"]
    counts: list[int] = pc.list_value_length(column).to_pylist()
    return counts


class Examples(Sequence[dict[str, Any]]):
    """The rows of a table as a sequence: each becomes Python objects when it is asked for, and not before."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Examples(self.dataset.select(range(*at.indices(len(self)))))
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self.dataset[at % len(self)]


def _batches(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterable[pa.RecordBatch]:
    import pyarrow as pa

    some: list[Mapping[str, Any]] = []
    for row in rows:
        some.append(row)
        if len(some) == BATCH:
            yield pa.RecordBatch.from_pylist(some, schema=schema)
            some = []
    if some:
        yield pa.RecordBatch.from_pylist(some, schema=schema)


def _new_file() -> Path:
    folder = cache_dir() / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.arrow"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink()
    path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.arrow"
    atexit.register(_forget, path, os.getpid())
    return path


def _forget(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker must not take the file away from its parent
        with contextlib.suppress(OSError):
            path.unlink()
