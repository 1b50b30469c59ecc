"""From the rows as they are to rows of one format, each checked before anything is tokenised; and what the labels and answers are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train.plain import plain
from slimtune.train.read import Source
from slimtune.train.row_files import kind_of
from slimtune.train.shapes import CLASS, KEYS, SCORE, SEVERAL, Shape
from slimtune.train.tables import write_table

if TYPE_CHECKING:
    from datasets import Dataset

    from slimtune.train.recipe import Recipe

MANY = 20  # more different answers than this are open-ended text, not a choice
_SHOWN = 5
_NUMBER = re.compile(r"-?[0-9]+")  # ASCII only: str.isdigit() also says yes to circled digits, which int() refuses


@dataclass(frozen=True)
class Checked:
    """The rows of one split: only the columns of their format, under our names; the keys that nothing uses; a SHA-256 of what is used."""

    rows: Dataset
    unused: list[str]
    digest: str


def normalise(source: Source, shape: Shape) -> Checked:
    """Return the rows of a source in our format, every row checked.

    Raises:
        DataError: missing keys, wrong types or empty texts, with the numbers of their rows.
    """
    import pyarrow as pa

    missing = [key for key in shape.needed if key not in source.columns]
    if missing:
        raise DataError(
            f"there is no {' and no '.join(repr(plain(key)) for key in missing)} in these rows",
            where=f"{source.name} has {', '.join(map(plain, source.columns))}",
            hint=f"every split must have the same keys as the training rows ({shape.format})",
        )
    problems: list[str] = []
    seen: dict[str, None] = {}
    kinds: dict[str, tuple[str, str]] = {}
    wrong, digest = 0, hashlib.sha256(shape.format.encode())

    def good() -> Iterator[dict[str, Any]]:
        nonlocal wrong
        for place, row in source:
            seen.update(dict.fromkeys(row))
            try:
                _one_kind(row, shape, kinds, place)
                made = shape.convert(row)
                digest.update(json.dumps(made).encode())
                yield made
            except ValueError as error:
                wrong += 1
                if len(problems) < _SHOWN:
                    problems.append(f"{place}: {error}")

    rows = write_table(good(), _schema(shape.format, pa))
    if wrong:
        more = f" (and {wrong - _SHOWN} more rows)" if wrong > _SHOWN else ""
        raise DataError("; ".join(problems) + more, where=source.name, hint="correct or remove these rows")
    used = {*shape.needed, *shape.optional}
    return Checked(rows, [key for key in seen if key not in used], digest.hexdigest())


def _one_kind(row: dict[str, Any], shape: Shape, kinds: dict[str, tuple[str, str]], place: str) -> None:
    """Raise ValueError where a value that is used is of another kind than in an earlier row: 1 and "1" would become one class."""
    for key in shape.needed:
        value = row.get(key)
        if value is not None:
            kind, earlier = kinds.setdefault(key, (kind_of(value), place))
            if kind != kind_of(value):
                raise ValueError(f"{key!r} is {kind_of(value)}, but in {earlier} it is {kind}")


def _schema(format: str, pa: Any) -> Any:
    types = {SEVERAL: pa.list_(pa.string()), SCORE: pa.float64()}
    return pa.schema([(key, types.get(format, pa.string()) if key == "label" else pa.string()) for key in KEYS[format]])


def find_labels(train: Dataset, source: Source) -> list[str]:
    """Return the labels of the training rows, numbers in their order, words in alphabetical order.

    Raises:
        DataError: there is only one.
    """
    found: set[str] = set()
    for label in train["label"]:
        found.update([label] if isinstance(label, str) else label)
    labels = sorted(found)
    if all(_NUMBER.fullmatch(label) for label in labels):
        labels.sort(key=lambda label: (int(label), label))
    if len(labels) < 2 and isinstance(train[0]["label"], str):
        raise DataError(f"every row has the same label, {labels[0]!r}: there is nothing to learn", where=source.name)
    if not labels:
        raise DataError("no row has a label: there is nothing to learn", where=source.name)
    return labels


def alike(labels: list[str]) -> list[str]:
    """Return notes on labels that differ in spaces, case or the writing of a number only: often one class by mistake two."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        word = " ".join(label.split()).casefold()
        with contextlib.suppress(ValueError):
            word = str(float(word))
        groups.setdefault(word, []).append(label)
    return [f"labels that look alike are different classes: {', '.join(map(repr, same))}" for same in groups.values() if len(same) > 1]


def check_labels(rows: Dataset, labels: list[str], source: Source) -> None:
    """Check that a validation or test split has no label that the training rows do not have.

    Raises:
        DataError: it has, with the first rows.
    """
    known = set(labels)
    unseen: dict[str, int] = {}
    for number, label in enumerate(rows["label"], 1):
        for one in [label] if isinstance(label, str) else label:
            if one not in known:
                unseen.setdefault(one, number)
    if unseen:
        shown = ", ".join(f"{label!r} (row {number})" for label, number in list(unseen.items())[:_SHOWN])
        raise DataError(
            f"labels that no training row has: {shown}",
            where=source.name,
            hint=f"the training rows have {', '.join(map(plain, labels[:MANY]))}; correct the spelling, or add such rows to them",
        )


def find_candidates(completions: Iterable[str]) -> list[str] | None:
    """Return the possible answers where they are a choice among few (each met often), most frequent first; else None."""
    counts: dict[str, int] = {}
    total = 0
    for text in completions:
        counts[text] = counts.get(text, 0) + 1
        total += 1
        if len(counts) > MANY:
            return None
    if len(counts) < 2 or total < 4 * len(counts):
        return None
    return sorted(counts, key=lambda text: (-counts[text], text))


def render_prompt(recipe: Recipe, format: str, text: str) -> str:
    """Return the prompt that the model sees for one input text (text + label: the recipe's template around it)."""
    return recipe.prompt_template.format(text=text) if format == CLASS else text


def message_keys(rows: Dataset) -> set[str]:
    """Return every key that some message of these conversations has."""
    return {key for text in rows["messages"] for m in json.loads(text) for key in m} if "messages" in rows.column_names else set()
