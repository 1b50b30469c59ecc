"""The rows of one file, one by one, with the number of each; what is wrong is said with its row and line.

CSV is text: "007" stays "007", and nothing becomes a number or a missing value because it looks like one. JSON keeps what it says,
nested objects too (Arrow would fill the keys that other rows have with nulls). Both are read line by line, `.gz` as well.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train.sources import data_kind

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_SEPARATORS = {"csv": ",;\t|", "tsv": "\t"}
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_EXAMPLE = 'one JSON object a line, such as {"prompt": "...", "completion": "..."}'
_CHAT = 'a conversation is an object too: {"messages": [...]}'


def rows_of_file(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (number, row), numbers from 1.

    Raises:
        DataError: the file cannot be read, or is not sound, with the row.
    """
    kind = data_kind(path)
    if kind == "parquet":
        yield from rows_of_table(_parquet(path))
        return
    try:
        with _open(path) as file:
            if kind in _SEPARATORS:
                yield from _csv_rows(file, path, _SEPARATORS[kind])
            else:
                yield from _json_rows(file, path)
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"this is not a sound gzip file: {error}", where=str(path), hint="make it again: gzip FILE") from error
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror or error}", where=str(path)) from error


def rows_of_table(table: Dataset) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) of an Arrow table: numbered classes by their names, and without the nulls that Arrow fills in for absent keys."""
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    number = 0
    try:
        for row in table:
            number += 1
            named = {k: names[k][v] if k in names and isinstance(v, int) and 0 <= v < len(names[k]) else v for k, v in row.items()}
            yield number, {key: _without_nulls(value) for key, value in named.items()}
    except UnicodeDecodeError:  # Arrow keeps bytes as they were in the file and finds out only now
        raise DataError(f"row {number + 1} is not text in UTF-8", hint="save the file as UTF-8") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _open(path: Path) -> io.TextIOWrapper:
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise DataError("the file is empty", where=str(path))
    if start[:2] in _BOMS:
        raise DataError(f"the file is in {_BOMS[start[:2]]}, not in UTF-8", where=str(path), hint="save the file as UTF-8")
    raw = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 - the wrapper closes it
    return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")  # type: ignore[type-var]


def _not_text(path: Path) -> DataError:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return DataError(f"row {number} is not text in UTF-8 (line {number} of the file)", where=str(path), hint="save the file as UTF-8")
    return DataError("the file is not text in UTF-8", where=str(path), hint="save the file as UTF-8")


def _lines(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise DataError(f"line {number} holds a NUL byte, so this is no text file", where=str(path), hint="save the file as UTF-8")
        yield line


# ---- CSV ------------------------------------------------------------------------------------------------------------
def _csv_rows(file: io.TextIOWrapper, path: Path, separators: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit of 128 KiB is below the length of a long document
    first = file.readline()
    file.seek(0)
    separator = next((s for s in separators if len(next(csv.reader([first], delimiter=s), [])) > 1), separators[0])
    reader = csv.reader(_lines(file, path), delimiter=separator, strict=True)
    number, line = -1, 0
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = "a quote is opened and not closed" if "end of data" in str(error) else f"its quotes are not in order ({error})"
            raise DataError(
                f"row {number + 1}, from line {line} of the file on: {wrong}",
                where=str(path),
                hint='put quotes around the whole text, and write a quote inside it twice: "a ""word"" here"',
            ) from error
        if not fields:
            continue
        number += 1
        if number == 0:
            header = _header(fields, path)
        elif len(fields) != len(header):
            raise DataError(
                f"row {number} has {len(fields)} fields, the header has {len(header)} (line {line} of the file)",
                where=str(path),
                hint=f"put quotes around a text that holds the separator {separator!r}"
                if len(fields) > len(header)
                else f"nothing stands for {', '.join(header[len(fields) :])}: an empty field has its separator {separator!r}, too",
            )
        else:
            yield number, dict(zip(header, fields, strict=True))


def _header(fields: list[str], path: Path) -> list[str]:
    names = [field.strip() or f"column {i}" for i, field in enumerate(fields, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the header names {', '.join(map(repr, twice))} twice", where=str(path), hint="give each column a name of its own")
    return names


# ---- JSON -----------------------------------------------------------------------------------------------------------
def _json_rows(file: io.TextIOWrapper, path: Path) -> Iterator[tuple[int, Row]]:
    start = ""
    items: Iterator[tuple[int, Any]]
    while (c := file.read(1)) and not (start := c.strip()):
        pass
    file.seek(0)
    if start == "[" and data_kind(path) == "json":  # one list of rows
        try:
            rows = json.loads(file.read(), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the file is not valid JSON: {error}", where=str(path), hint=_EXAMPLE) from error
        items = enumerate(rows, 1)
    else:
        items = _json_lines(file, path)
    for number, row in items:
        if not isinstance(row, dict):
            hint = _CHAT if isinstance(row, list) else _EXAMPLE
            raise DataError(f"row {number} is {kind_of(row)}, not an object with named fields", where=str(path), hint=hint)
        yield number, row


def _json_lines(file: io.TextIOWrapper, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(file, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
            if "\\ud" in line or "\\uD" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"row {number} holds half of a character (a lone surrogate)", where=str(path), hint="write the file as UTF-8 once more"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"row {number} is not valid JSON: {error}", where=str(path), hint=_EXAMPLE) from error
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object; a key that is there twice would silently lose its first value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return made


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


# ---- parquet --------------------------------------------------------------------------------------------------------
def _parquet(path: Path) -> Dataset:
    import datasets

    from slimtune.train.fetch import cache_dir

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what is raised as well
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(cache_dir() / "datasets"))
    except Exception as error:  # the reader raises whatever Arrow raises
        raise DataError("this is not a sound parquet file", where=str(path)) from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
