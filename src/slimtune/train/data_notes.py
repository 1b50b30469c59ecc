"""What is said about data: what there is to answer, and what in it looks like a mistake or is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimtune.train.formats import MANY, message_keys
from slimtune.train.plain import plain
from slimtune.train.render import template_of
from slimtune.train.shapes import CLASS, PAIR, SCORE
from slimtune.train.tokens import IGNORE, Encoder

if TYPE_CHECKING:
    from datasets import Dataset

    from slimtune.train.data import DataBundle

_OURS = {"role", "content", "train", "tool_calls", "tool_call_id"}  # keys of a message that are dealt with here


def answers_text(data: DataBundle, task: str) -> str:
    """Return one line about what there is to answer: classes with their numbers, scores, or a choice among texts; "" of free text."""
    if data.format == SCORE:
        scores = [score for rows in data.raw.values() for score in rows["label"]]
        return f"scores from {min(scores):g} to {max(scores):g}"
    if task == "classification":
        named = ", ".join(f"{i} = {plain(label)}" for i, label in enumerate(data.labels[:MANY]))
        kind = "classes" if data.format == CLASS else "labels, any number of them at once"
        return f"{len(data.labels)} {kind}: {named}{', ...' if len(data.labels) > MANY else ''}"
    if data.candidates:
        few = ", ".join(plain(a.strip()) for a in data.candidates[:8])
        return f"answers: {few}{f', ... ({len(data.candidates)} in all)' if len(data.candidates) > 8 else ''}"
    return "answers: free text (no choice among few), so there is a loss and no accuracy" if data.format == PAIR else ""


def number_notes(labels: list[str], format: str) -> list[str]:
    """Return a note where classes look like scores."""
    try:
        fractions = sum(not float(label).is_integer() for label in labels)
    except (ValueError, OverflowError):
        return []
    if format != CLASS or not fractions or len(labels) <= MANY:
        return []
    return [f"the labels are {len(labels)} different numbers, each taken for a class; `task: regression` reads them as scores"]


def chat_notes(dataset: Dataset, examples: Dataset, encoder: Encoder) -> list[str]:
    """Return notes on keys of messages that the template does not read, and on answers that it gives no end."""
    notes = []
    source = str(encoder.tokenizer.chat_template) if isinstance(encoder.tokenizer.chat_template, dict) else template_of(encoder, None)
    unread = sorted(key for key in message_keys(dataset) - _OURS if key not in source)
    if unread:
        notes.append(f"keys of messages that the chat template does not read: {', '.join(map(plain, unread))}")
    last = next((t for t in reversed(examples[0]["labels"]) if t != IGNORE), None)
    if last not in set(encoder.tokenizer.get_added_vocab().values()) | set(encoder.tokenizer.all_special_ids):
        notes.append("the chat template ends an answer with no special token (with loss), so the model does not learn where to stop")
    return notes
