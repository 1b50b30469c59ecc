"""One row to one example: input_ids, and labels that are -100 where there is no loss; what is too long is cut where it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimtune.train.chat import shorter_chats, tokenise_chat
from slimtune.train.formats import render_prompt
from slimtune.train.tokens import IGNORE, Encoder

if TYPE_CHECKING:
    from slimtune.train.data import Rows
    from slimtune.train.models import Task
    from slimtune.train.recipe import Recipe

Example = dict[str, Any]
Maker = Callable[[Example], "tuple[Example, bool] | None"]


def maker(rows: Rows, recipe: Recipe, encoder: Encoder, task: Task, max_length: int) -> Maker:
    """Return the function row -> (example, was it shortened), or None if the row does not fit."""
    eos = [] if encoder.tokenizer.eos_token_id is None else [encoder.tokenizer.eos_token_id]
    index = {label: i for i, label in enumerate(rows.labels)}

    def whole_text(row: Example) -> tuple[Example, bool] | None:
        if task == "classification":
            room = max_length - len(encoder.prefix) - len(encoder.suffix)
            ids, cut = _fit(encoder, row["text"], room, recipe.truncate)
            return {"input_ids": encoder.prefix + ids + encoder.suffix, "label": index[row["label"]]}, cut
        room = max_length - len(encoder.prefix)
        ids, cut = _fit(encoder, row["text"], room, recipe.truncate)
        ids = encoder.prefix + ids
        if not cut and len(ids) + len(eos) <= max_length:
            ids = ids + eos
        return {"input_ids": ids, "labels": list(ids)}, cut

    def answer(row: Example) -> tuple[Example, bool] | None:
        labelled = rows.format == "text+label"
        text = row["text"] if labelled else row["prompt"]
        completion = recipe.completion_template.format(label=row["label"]) if labelled else row["completion"]
        room = max_length - len(encoder.prefix) - len(eos)
        keep: int | None = None
        for _ in range(8):  # cutting can change how the rest is tokenised, so it is measured again
            short = text if keep is None else encoder.shorten(text, keep, recipe.truncate)
            prompt, target = encoder.parts([render_prompt(recipe, rows.format, short), completion])
            over = len(prompt) + len(target) - room
            if over <= 0:
                ids = encoder.prefix + prompt + target + eos
                labels = [IGNORE] * (len(ids) - len(target) - len(eos)) + target + eos
                return {
                    "input_ids": ids,
                    "labels": labels,
                    **({"label": index[row["label"]]} if labelled else {}),
                }, keep is not None
            keep = (len(encoder.plain([text])[0]) if keep is None else keep) - over
            if keep <= 0:
                return None
        return None

    def chat(row: Example) -> tuple[Example, bool] | None:
        for i, messages in enumerate([row["messages"], *shorter_chats(row["messages"])]):
            ids, labels = tokenise_chat(encoder, messages)
            if len(ids) <= max_length:
                return {"input_ids": ids, "labels": labels}, i > 0
        return None

    if rows.format == "messages":
        return chat
    return whole_text if task == "classification" or rows.format == "text" else answer


def _fit(encoder: Encoder, text: str, room: int, keep: str) -> tuple[list[int], bool]:
    ids = encoder.plain([text])[0]
    if len(ids) <= room:
        return ids, False
    if keep == "ends":
        return ids[: (room + 1) // 2] + ids[len(ids) - room // 2 :], True
    return (ids[:room] if keep == "head" else ids[len(ids) - room :]), True
