"""One row to its examples: input_ids, and labels that are -100 where there is no loss; what is too long is cut where it may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train.chat import Rewritten, one_answer_each, shorter_chats, tokenise_chat
from slimtune.train.formats import render_prompt
from slimtune.train.problems import PROBLEMS
from slimtune.train.shapes import CHAT, CLASS, PAIR, TEXT
from slimtune.train.tokens import IGNORE, Encoder

if TYPE_CHECKING:
    from slimtune.train.data import Rows
    from slimtune.train.models import Task
    from slimtune.train.recipe import Recipe

Example = dict[str, Any]
Maker = Callable[[Example], list[tuple[Example, bool]]]


def maker(rows: Rows, recipe: Recipe, encoder: Encoder, task: Task, max_length: int) -> Maker:
    """Return the function row -> its examples, each with whether it was shortened; none if the row does not fit."""
    eos = [] if encoder.tokenizer.eos_token_id is None else [encoder.tokenizer.eos_token_id]
    index = {label: i for i, label in enumerate(rows.labels)}

    def labelled_text(row: Example) -> list[tuple[Example, bool]]:
        room = max_length - len(encoder.prefix) - len(encoder.suffix)
        ids, cut = _fit(encoder, row["text"], room, recipe.truncate)
        target = PROBLEMS[rows.format].encode(row["label"], index)
        return [({"input_ids": encoder.prefix + ids + encoder.suffix, "label": target}, cut)]

    def whole_text(row: Example) -> list[tuple[Example, bool]]:
        room = max_length - len(encoder.prefix)
        ids, cut = _fit(encoder, row["text"], room, recipe.truncate)
        ids = encoder.begin(ids)
        if not cut and len(encoder.finish(ids)) <= max_length:
            ids = encoder.finish(ids)
        return [({"input_ids": ids, "labels": list(ids)}, cut)]

    def answer(row: Example) -> list[tuple[Example, bool]]:
        labelled = rows.format == CLASS
        text = row["text"] if labelled else row["prompt"]
        completion = recipe.completion_template.format(label=row["label"]) if labelled else row["completion"]
        room = max_length - len(encoder.prefix) - len(eos)
        keep: int | None = None
        for _ in range(8):  # cutting can change how the rest is tokenised, so it is measured again
            short = text if keep is None else encoder.shorten(text, keep, recipe.truncate)
            prompt, target = encoder.parts([render_prompt(recipe, rows.format, short), completion])
            over = len(prompt) + len(target) - room
            if over <= 0:
                target = encoder.finish(target)
                ids = encoder.begin(prompt) + target
                labels = [IGNORE] * (len(ids) - len(target)) + target
                made = {"input_ids": ids, "labels": labels, **({"label": index[row["label"]]} if labelled else {})}
                return [(made, keep is not None)]
            keep = (len(encoder.plain([text])[0]) if keep is None else keep) - over
            if keep <= 0:
                return []
        return []

    def chat(row: Example) -> list[tuple[Example, bool]]:
        messages, tools = json.loads(row["messages"]), json.loads(row["tools"]) if row["tools"] else None

        def fitting(part: list[Example]) -> list[tuple[Example, bool]]:
            for i, turns in enumerate([part, *shorter_chats(part)]):
                ids, labels = tokenise_chat(encoder, turns, tools)
                if len(ids) <= max_length:
                    return [({"input_ids": ids, "labels": labels}, i > 0)]
            return []

        try:
            return fitting(messages)
        except Rewritten:
            return [made for part in one_answer_each(messages) for made in fitting(part)]

    if task == "classification":
        return labelled_text
    makers: dict[str, Maker] = {CHAT: chat, TEXT: whole_text, PAIR: answer, CLASS: answer}
    if rows.format not in makers:
        raise DataError(f"a causal LM cannot be trained on {rows.format}", hint="task: classification, or leave task out")
    return makers[rows.format]


def _fit(encoder: Encoder, text: str, room: int, keep: str) -> tuple[list[int], bool]:
    ids = encoder.plain([text])[0]
    if len(ids) <= room:
        return ids, False
    if keep == "ends":
        return ids[: (room + 1) // 2] + ids[len(ids) - room // 2 :], True
    return (ids[:room] if keep == "head" else ids[len(ids) - room :]), True
