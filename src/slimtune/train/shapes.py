"""The shapes in which people keep data, told apart by their keys, each with how one row of it becomes a row of ours.

messages (or `conversations`, with role / content or ShareGPT's from / value; beside them `tools` and `system`)
prompt + completion     texts, or lists of messages (then a chat, with loss on the completion's turns only)
instruction + output    Alpaca's (`input` below the instruction) and Dolly's (response, context): a chat of one turn
text + label            a word or number, several words (a list), or a score
chosen + rejected       preference pairs: recognised, and refused with what to write to train on the chosen answers
text
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError, closest
from slimtune.train.messages import chat_row
from slimtune.train.plain import plain

if TYPE_CHECKING:
    from slimtune.train.read import Source
    from slimtune.train.recipe import Recipe

Row = dict[str, Any]
CHAT, PAIR, CLASS, SEVERAL, SCORE, TEXT = "messages", "prompt+completion", "text+label", "text+labels", "text+score", "text"
KEYS = {CHAT: ("messages", "tools"), PAIR: ("prompt", "completion"), TEXT: ("text",)} | dict.fromkeys((CLASS, SEVERAL, SCORE), ("text", "label"))
_INSTRUCTIONS = (("instruction", "output", "input"), ("instruction", "response", "context"))


@dataclass(frozen=True)
class Shape:
    """How the rows of a data set are to be read.

    Attributes:
        format: what they become: messages | prompt+completion | text+label | text+labels | text+score | text.
        needed: keys that every row must have.
        optional: keys that are used where they are there.
        convert: row -> row of our format; raises ValueError with what is wrong with it.
        said: the shape in words, where it is not plain from the format.
    """

    format: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], Row]
    said: str = ""


def recognise(source: Source, recipe: Recipe) -> Shape:
    """Return the shape of a data set, from the names of its columns and its first rows.

    Raises:
        DataError: they fit no shape, or one that nothing trains on.
    """
    there = set(source.columns)
    for shape in shapes(recipe, source.head, untyped=source.untyped):
        if set(shape.needed) <= there:
            return shape
    if {"chosen", "rejected"} <= there:
        raise _preferences(source, recipe)
    raise DataError(
        f"these keys are of no known format: {', '.join(map(plain, sorted(there)))}{_half(there, recipe)}",
        where=source.name,
        hint=_hint(source, recipe),
    )


def shapes(recipe: Recipe, head: Sequence[Row], untyped: bool = False) -> list[Shape]:
    """Return the shapes in the order in which they are tried, under the names that a recipe gives the columns.

    Args:
        recipe: for the names of the columns, and the task.
        head: the first rows, which tell lists from texts.
        untyped: labels are text, whatever they look like.
    """
    r = recipe
    chat, prompt, completion, text, label = r.messages_column, r.prompt_column, r.completion_column, r.text_column, r.label_column
    found = [
        Shape(CHAT, (chat,), ("tools", "system"), lambda row: chat_row(row, row.get(chat))),
        Shape(CHAT, ("conversations",), ("tools", "system"), lambda row: chat_row(row, row.get("conversations")), "ShareGPT conversations"),
    ]
    if any(isinstance(row.get(key), list) for row in head[:1] for key in (prompt, completion)):
        found.append(
            Shape(CHAT, (prompt, completion), ("tools",), lambda row: _turns(row, prompt, completion), "prompt and completion as messages")
        )
    below = next(((extra,) for first, _, extra in _INSTRUCTIONS if first == prompt and any(extra in row for row in head)), ())
    found.append(Shape(PAIR, (prompt, completion), below, lambda row: _pair(row, prompt, completion, below)))
    for first, last, extra in _INSTRUCTIONS:
        found.append(
            Shape(
                CHAT,
                (first, last),
                (extra, "system"),
                partial(_instruction, first=first, last=last, extra=extra),
                f"instructions, each with its {extra}, as chats of one turn",
            )
        )
    kind = label_kind([row.get(label) for row in head], r.task, untyped)
    found.append(Shape(kind, (text, label), (), lambda row: {"text": text_of(row, text), "label": _LABELS[kind](row, label)}))
    found.append(Shape(TEXT, (text,), (), lambda row: {"text": text_of(row, text)}))
    return found


def text_of(row: Row, key: str, empty: bool = False) -> str:
    """Return a row's text.

    Raises:
        ValueError: it is missing, no text, or empty where that is not allowed.
    """
    value = row.get(key)
    if value is None:
        raise ValueError(f"{key!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {short(value)}, not text")
    if not empty and not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


# ---- labels ---------------------------------------------------------------------------------------------------------
def label_kind(labels: Sequence[Any], task: str, untyped: bool) -> str:
    """Return what the labels are: classes, several words for a row, or scores."""
    there = [label for label in labels if label is not None]
    if there and all(isinstance(label, list) for label in there):
        return SEVERAL
    if task == "regression":
        return SCORE
    fractions = any(isinstance(label, float) and label == label and not label.is_integer() for label in there)
    return SCORE if fractions and not untyped and task != "classification" else CLASS


def label_text(row: Row, key: str = "label") -> str:
    """Return a row's class as text: true / false for booleans.

    Raises:
        ValueError: it is missing, or is no word or whole number.
    """
    label = row.get(key)
    if label is None:
        raise ValueError(f"{key!r} is missing")
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f"the label is {label}, which is no number")
    if isinstance(label, float) and not label.is_integer():
        raise ValueError(f"the label {label} is a number with a fraction; `task: regression` reads every label as a score")
    if isinstance(label, float):
        label = int(label)
    if isinstance(label, bool):
        return str(label).lower()
    if not isinstance(label, (str, int)):
        raise ValueError(f"the label is {short(label)}, not a word or a whole number")
    if not str(label).strip():
        raise ValueError(f"{key!r} is empty")
    return str(label)


def _label_texts(row: Row, key: str) -> list[str]:
    labels = row.get(key)
    if labels is None:
        raise ValueError(f"{key!r} is missing")
    if not isinstance(labels, list):
        raise ValueError(f"{key!r} is {short(labels)}, but other rows have a list of labels")
    found = [label_text({"label": label}) for label in labels]
    if len(set(found)) < len(found):
        raise ValueError(f"{key!r} names a label twice: {short(labels)}")
    return found


def _score(row: Row, key: str) -> float:
    label = row.get(key)
    if label is None:
        raise ValueError(f"{key!r} is missing")
    try:
        if isinstance(label, bool):
            raise ValueError
        score = float(label)
    except (TypeError, ValueError):
        raise ValueError(f"the label {short(label)} is not a score; `task: classification` reads labels as classes") from None
    if score != score or score in (float("inf"), -float("inf")):
        raise ValueError(f"the label {label} is not a finite number")
    return score


_LABELS: dict[str, Callable[[Row, str], Any]] = {CLASS: label_text, SEVERAL: _label_texts, SCORE: _score}


# ---- rows of other shapes -------------------------------------------------------------------------------------------
def _pair(row: Row, prompt: str, completion: str, below: tuple[str, ...]) -> Row:
    answer = text_of(row, completion, empty=True)
    if answer == "":
        raise ValueError(f"{completion!r} is empty")
    return {"prompt": _below(text_of(row, prompt, empty=True), row, *below), "completion": answer}


def _below(text: str, row: Row, key: str = "") -> str:
    more = row.get(key)
    if more is not None and not isinstance(more, str):
        raise ValueError(f"{key!r} is {short(more)}, not text")
    return f"{text}\n\n{more}" if more and more.strip() else text


def _instruction(row: Row, first: str, last: str, extra: str) -> Row:
    asked = _below(text_of(row, first), row, extra)
    return chat_row(row, [{"role": "user", "content": asked}, {"role": "assistant", "content": text_of(row, last)}])


def _turns(row: Row, prompt: str, completion: str) -> Row:
    before, after = row.get(prompt), row.get(completion)
    asked: Any = [{"role": "user", "content": before}] if isinstance(before, str) else before
    said: Any = [{"role": "assistant", "content": after}] if isinstance(after, str) else after
    for key, value in ((prompt, asked), (completion, said)):
        if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
            raise ValueError(f"{key!r} is {'missing' if value is None else short(value)}, not a list of messages")
    return chat_row(row, [*({**m, "train": False} if m.get("role") == "assistant" else m for m in asked), *said])


# ---- words ----------------------------------------------------------------------------------------------------------
def short(value: Any) -> str:
    """Return a value as it would be typed, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else repr(value)
    return plain(text if len(text) <= 60 else text[:57] + "...")


def _preferences(source: Source, recipe: Recipe) -> DataError:
    first = source.head[0]
    how = f"messages_column: {plain('chosen')}" if isinstance(first.get("chosen"), list) else "text_column: chosen"
    if isinstance(first.get("chosen"), str) and isinstance(first.get(recipe.prompt_column), str):
        how = "completion_column: chosen"
    return DataError(
        "these are preference pairs (chosen and rejected), and no task trains on pairs yet",
        where=source.name,
        hint=f"to train on the chosen answers alone: {how}",
    )


def _half(there: set[str], recipe: Recipe) -> str:
    pairs = ((recipe.prompt_column, recipe.completion_column), (recipe.label_column, recipe.text_column))
    return next((f" ({a} without {b})" for x, y in pairs for a, b in ((x, y), (y, x)) if a in there and b not in there), "")


def _hint(source: Source, recipe: Recipe) -> str:
    """Name the columns that could be meant, only among those that hold what is asked for: an index or a label is no prompt."""
    used = {c for c in (recipe.prompt_column, recipe.completion_column, recipe.text_column, recipe.label_column) if c in source.columns}
    texts = [c for c in source.columns if c not in used and any(_is_prose(row.get(c)) for row in source.head)]
    hint = "the rows need text | prompt and completion | messages | text and label"
    lists = [c for c in source.columns if any(_is_chat(row.get(c)) for row in source.head)]
    if lists:
        return f"{hint}; if yours have other names, say so: messages_column: {plain(lists[0])}"
    few = [c for c in source.columns if c not in used and _is_choice([row.get(c) for row in source.head])]
    prose = [c for c in texts if c not in few]
    if prose and few and not used:
        return f"{hint}; if yours have other names, say so: text_column: {plain(prose[0])}, label_column: {plain(few[-1])}"
    if recipe.prompt_column in used and texts:
        return f"{hint}; if yours have other names, say so: completion_column: {plain(closest(recipe.completion_column, texts, n=1))}"
    if recipe.completion_column in used and texts:
        return f"{hint}; if yours have other names, say so: prompt_column: {plain(closest(recipe.prompt_column, texts, n=1))}"
    if len(texts) == 2:
        return f"{hint}; if yours have other names, say so: prompt_column: {plain(texts[0])}, completion_column: {plain(texts[1])}"
    if texts:
        return f"{hint}; if yours have other names, say so: text_column: {plain(closest(recipe.text_column, texts, n=1))}"
    return hint


def _is_prose(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return bool(value.strip())
    return False


def _is_choice(values: list[Any]) -> bool:
    try:
        different = len(set(values))
    except TypeError:  # lists and objects
        return False
    return 2 <= different <= 20 and len(values) >= 2 * different


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "from"} & set(m) for m in value)
