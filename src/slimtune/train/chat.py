"""Tokens and loss mask of a conversation: the loss is on what the assistant says, and on the token that ends its turn.

Templates with the `generation` keyword mark the assistant's parts themselves. Most do not (SmolLM2's among them): there the
conversation is rendered turn by turn, and the text a turn adds, after the header that starts an answer, is the assistant's.
A template that rewrites earlier turns (Qwen3 leaves out their thoughts) gives one example for each answer, cut after it: then the
text before the answer is what the model will see when it writes it.
"""

from __future__ import annotations

from typing import Any

from slimtune.core.errors import DataError
from slimtune.train.render import Message, as_written, render, template_of
from slimtune.train.tokens import IGNORE, Encoder


class Rewritten(DataError):
    """The chat template writes an earlier turn in another way once others follow it."""


def tokenise_chat(encoder: Encoder, messages: list[Message], tools: list[Any] | None = None) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one conversation; no loss on messages with `train: false`.

    Raises:
        Rewritten: the answers cannot be found in one text; `one_answer_each` gives conversations in which they can.
        DataError: there is no chat template, or it cannot write this conversation.
    """
    learned = [m["role"] == "assistant" and m.get("train", True) for m in messages]
    marks = "{% generation" in template_of(encoder, tools).replace("{%-", "{%")
    messages = as_written(encoder, [{k: v for k, v in m.items() if k != "train"} for m in messages], tools)
    if marks:
        return _marked(encoder, messages, tools, learned)
    ids, labels = [], []
    segments = assistant_segments(encoder, messages, tools, learned)
    for (_, on), part in zip(segments, encoder.parts([text for text, _ in segments]), strict=True):
        ids += part
        labels += part if on else [IGNORE] * len(part)
    return ids, labels


def assistant_segments(
    encoder: Encoder, messages: list[Message], tools: list[Any] | None = None, learned: list[bool] | None = None
) -> list[tuple[str, bool]]:
    """Return a conversation's text in consecutive pieces, each with whether it is to be learnt."""
    whole = render(encoder, messages, tools)
    segments: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if not (learned[i] if learned is not None else message["role"] == "assistant"):
            continue
        after = render(encoder, messages[: i + 1], tools)
        before = render(encoder, messages[:i], tools, start_answer=True) if i else _first_header(encoder, after)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise Rewritten(
                "the model's chat template rewrites earlier turns, so the assistant's words cannot be found in it",
                where=str(encoder.tokenizer.name_or_path),
                hint="use data with prompt and completion, which need no template",
            )
        # The line break after the end-of-turn token is never generated: generation has stopped by then.
        end = max(len(after.rstrip()), len(before))
        segments += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    segments.append((whole[done:], False))
    return [(text, on) for text, on in segments if text]


def one_answer_each(messages: list[Message]) -> list[list[Message]]:
    """Return one conversation for each answer that is to be learnt, ending with it."""
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", True):
            found.append([*({**m, "train": False} if m["role"] == "assistant" else m for m in messages[:i]), message])
    return found


def shorter_chats(messages: list[Message]) -> list[list[Message]]:
    """Return the conversation without its oldest turns, in every way that starts with a user's turn; the system's stays."""
    system = messages[:1] if messages[0]["role"] in {"system", "developer"} else []
    rest = messages[len(system) :]
    starts = [i for i, m in enumerate(rest) if m["role"] == "user" and i > 0]
    return [[*system, *rest[i:]] for i in starts if any(m["role"] == "assistant" and m.get("train", True) for m in rest[i:])]


def end_of_turn(encoder: Encoder) -> int | None:
    """Return the token that a model trained with this template ends its answers with; None if that is no token of its own."""
    try:
        _, labels = tokenise_chat(encoder, [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello"}])
    except DataError:  # a template with wishes that these two lines do not meet
        return None
    last = next((i for i in reversed(labels) if i != IGNORE), None)
    return last if last in set(encoder.tokenizer.get_added_vocab().values()) | set(encoder.tokenizer.all_special_ids) else None


def _first_header(encoder: Encoder, first: str) -> str:
    """Return what stands before the words of a conversation that the assistant opens: the header that otherwise starts an answer."""
    try:
        asked = [{"role": "user", "content": "a"}]
        header = render(encoder, asked, start_answer=True)[len(render(encoder, asked)) :]
    except DataError:
        return ""
    return first[: first.index(header) + len(header)] if header and header in first else ""


def _marked(encoder: Encoder, messages: list[Message], tools: list[Any] | None, learned: list[bool]) -> tuple[list[int], list[int]]:
    """A template with the `generation` keyword says itself which tokens the assistant wrote."""
    out: Any = encoder.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    turns = [on for m, on in zip(messages, learned, strict=True) if m["role"] == "assistant"]
    starts = [i for i, on in enumerate(mask) if on and (i == 0 or not mask[i - 1])]
    if not starts:
        raise DataError(
            "the model's chat template marks no token of this conversation as the assistant's",
            where=str(encoder.tokenizer.name_or_path),
            hint="use data with prompt and completion, which need no template",
        )
    if all(turns):
        return ids, [i if on else IGNORE for i, on in zip(ids, mask, strict=True)]
    if len(starts) != len(turns):
        raise DataError(
            f"the model's chat template marks {len(starts)} answers of {len(turns)}, so those with train: false cannot be told from the others",
            where=str(encoder.tokenizer.name_or_path),
            hint="split the conversation, so that it ends with the one answer to learn",
        )
    at, labels = -1, []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        at += i in starts
        labels.append(token if on and turns[at] else IGNORE)
    return ids, labels
