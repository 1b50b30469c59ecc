"""The four shapes of data, told apart by their keys, and the check of every row before anything is tokenised.

messages             a chat: [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]
prompt + completion  loss on the completion only
text + label         classification; with a causal LM the recipe's templates make a prompt and a completion of it
text                 loss on every token
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from slimtune.core.errors import DataError, closest
from slimtune.train.read import Source

if TYPE_CHECKING:
    from datasets import Dataset

    from slimtune.train.recipe import Recipe

Format = Literal["messages", "prompt+completion", "text+label", "text"]
KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "text+label": ("text", "label"),
    "text": ("text",),
}
MANY = 20  # more different answers than this are open-ended text, not a choice
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SHOWN = 5


def recognise(source: Source, recipe: Recipe) -> Format:
    """Return the format of a data set, from the names of its columns.

    Raises:
        DataError: they fit no format.
    """
    there = set(source.rows.column_names)
    for format, keys in KEYS.items():
        if {_column(recipe, key) for key in keys} <= there:
            return format
    wanted = {_column(recipe, key) for keys in KEYS.values() for key in keys}
    near = {name: closest(name, there, n=1) for name in sorted(wanted - there)}
    half = next(
        (
            f"{a} without {b}"
            for a, b in (("prompt", "completion"), ("completion", "prompt"), ("label", "text"))
            if _column(recipe, a) in there and _column(recipe, b) not in there
        ),
        "",
    )
    example = next(((key, near[_column(recipe, key)]) for key in ("prompt", "completion", "text") if _column(recipe, key) in near), None)
    hint = "the rows need text | prompt and completion | messages | text and label"
    if example and example[1]:
        hint += f"; if yours have other names, say so: {example[0]}_column: {example[1]}"
    raise DataError(
        f"these keys are of no known format: {', '.join(sorted(there))}" + (f" ({half})" if half else ""),
        where=source.name,
        hint=hint,
    )


def normalise(source: Source, format: Format, recipe: Recipe) -> Dataset:
    """Return the rows with only the columns of their format, under our names, labels as text; every row checked.

    Raises:
        DataError: missing keys, wrong types or empty texts, with the numbers of their rows.
    """
    rows, keys = source.rows, KEYS[format]
    missing = [_column(recipe, key) for key in keys if _column(recipe, key) not in rows.column_names]
    if missing:
        raise DataError(
            f"there is no {' and no '.join(map(repr, missing))} in these rows",
            where=f"{source.name} has {', '.join(rows.column_names)}",
            hint=f"every split must have the same keys as the training rows ({format})",
        )
    # Rename by way of selecting: a column that already bears the new name must not be in the way.
    rows = rows.select_columns([_column(recipe, key) for key in keys])
    rows = rows.rename_columns({_column(recipe, key): key for key in keys if _column(recipe, key) != key})
    names = getattr(rows.features["label"], "names", None) if "label" in keys else None  # ClassLabel: numbers that stand for names
    problems: list[str] = []
    labels: list[str] = []
    for number, row in enumerate(_decoded(rows, source.name), 1):
        found = _row_problem(row, format)
        if found:
            problems.append(f"row {number}: {found}")
        elif "label" in keys:
            labels.append(label_text(row["label"], names))
    if problems:
        more = f" (and {len(problems) - _SHOWN} more rows)" if len(problems) > _SHOWN else ""
        raise DataError("; ".join(problems[:_SHOWN]) + more, where=source.name, hint="correct or remove these rows")
    if "label" in keys:
        rows = rows.remove_columns("label").add_column("label", labels)
    return rows


def label_text(label: Any, names: list[str] | None = None) -> str:
    """Return a label as text: class names for numbered classes, true / false for booleans."""
    if names is not None and isinstance(label, int):
        return str(names[label])
    return str(label).lower() if isinstance(label, bool) else str(label)


def find_labels(train: Dataset, source: Source) -> list[str]:
    """Return the labels of the training rows, numbers in their order, words in alphabetical order.

    Raises:
        DataError: there is only one.
    """
    labels = sorted(set(train["label"]))
    if all(label.lstrip("-").isdigit() for label in labels):
        labels.sort(key=int)
    if len(labels) < 2:
        raise DataError(f"every row has the same label, {labels[0]!r}: there is nothing to learn", where=source.name)
    return labels


def check_labels(rows: Dataset, labels: list[str], source: Source) -> None:
    """Check that a validation or test split has no label that the training rows do not have.

    Raises:
        DataError: it has, with the first rows.
    """
    known = set(labels)
    unseen: dict[str, int] = {}
    for number, label in enumerate(rows["label"], 1):
        if label not in known:
            unseen.setdefault(label, number)
    if unseen:
        shown = ", ".join(f"{label!r} (row {number})" for label, number in list(unseen.items())[:_SHOWN])
        raise DataError(
            f"labels that no training row has: {shown}",
            where=source.name,
            hint=f"the training rows have {', '.join(labels[:MANY])}; correct the spelling, or add such rows to them",
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
    return recipe.prompt_template.format(text=text) if format == "text+label" else text


def _decoded(rows: Dataset, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows; Arrow keeps bytes as they were in the file and finds out only now that they are no text."""
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except UnicodeDecodeError:
        raise DataError(f"row {number + 1} is not text in UTF-8", where=name, hint="save the file as UTF-8") from None


def _column(recipe: Recipe, key: str) -> str:
    return str(getattr(recipe, f"{key}_column"))


def _row_problem(row: dict[str, Any], format: Format) -> str:
    if format == "messages":
        return _chat_problem(row["messages"])
    for key in KEYS[format]:
        value = row[key]
        if value is None:
            return f"{key!r} is missing"
        if key == "label":
            if isinstance(value, float):
                return f"the label {value} is a number with a fraction; a label is a word or a whole number"
            if not isinstance(value, (str, int)):
                return f"the label is {type(value).__name__}, not a word or a whole number"
        elif not isinstance(value, str):
            return f"{key!r} is {value!r}, not text"
        if key != "prompt" and (value == "" or (key in {"text", "label"} and isinstance(value, str) and not value.strip())):
            return f"{key!r} is empty"
    return ""


def _chat_problem(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list of messages" if messages else "'messages' is empty"
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {i} has no 'role'"
        if message["role"] not in _ROLES:
            return f"message {i} has the role {message['role']!r}, not one of {', '.join(sorted(_ROLES))}"
        if not isinstance(message.get("content"), str):
            return f"message {i} has no text in 'content'"
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return "no message of the assistant, so there is nothing to learn"
    return ""
