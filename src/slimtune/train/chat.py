"""Tokens and loss mask of a conversation: the loss is on what the assistant says, and on the token that ends its turn.

Templates with the `generation` keyword mark the assistant's parts themselves. Most do not (SmolLM2's among them): there the
conversation is rendered turn by turn, and the text a turn adds, after the header that starts an answer, is the assistant's.
Each rendering must be the beginning of the next one; a template that rewrites earlier turns is refused, not guessed at.
"""

from __future__ import annotations

from typing import Any

from slimtune.core.errors import DataError
from slimtune.train.tokens import IGNORE, Encoder

Message = dict[str, Any]


def tokenise_chat(encoder: Encoder, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one conversation.

    Raises:
        DataError: there is no chat template, or it cannot render this conversation consistently.
    """
    template = encoder.tokenizer.chat_template
    if template is None:
        raise DataError(
            "the model has no chat template, so messages cannot be written out",
            where=str(encoder.tokenizer.name_or_path),
            hint="use an instruct model, or data with prompt and completion",
        )
    messages = [{key: value for key, value in m.items() if value is not None} for m in messages]  # Arrow fills absent keys with None
    if isinstance(template, str) and "{% generation" in template.replace("{%-", "{%"):
        out: Any = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(out["input_ids"])
        return ids, [i if on else IGNORE for i, on in zip(ids, out["assistant_masks"], strict=True)]
    ids, labels = [], []
    segments = assistant_segments(encoder, messages)
    for (_, learned), part in zip(segments, encoder.parts([text for text, _ in segments]), strict=True):
        ids += part
        labels += part if learned else [IGNORE] * len(part)
    return ids, labels


def assistant_segments(encoder: Encoder, messages: list[Message]) -> list[tuple[str, bool]]:
    """Return a conversation's text in consecutive pieces, each with whether the assistant says it."""
    whole = _render(encoder, messages)
    segments: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(encoder, messages[:i], start_answer=True) if i else ""
        after = _render(encoder, messages[: i + 1])
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise DataError(
                "the model's chat template rewrites earlier turns, so the assistant's words cannot be found in it",
                where=str(encoder.tokenizer.name_or_path),
                hint="split the conversations into one answer each, or use prompt and completion",
            )
        # The line break after the end-of-turn token is never generated: generation has stopped by then.
        end = max(len(after.rstrip()), len(before))
        segments += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    segments.append((whole[done:], False))
    return [(text, learned) for text, learned in segments if text]


def shorter_chats(messages: list[Message]) -> list[list[Message]]:
    """Return the conversation without its oldest turns, in every way that starts with a user's turn; the system's stays."""
    system = messages[:1] if messages[0]["role"] in {"system", "developer"} else []
    rest = messages[len(system) :]
    starts = [i for i, m in enumerate(rest) if m["role"] == "user" and i > 0]
    return [[*system, *rest[i:]] for i in starts if any(m["role"] == "assistant" for m in rest[i:])]


def _render(encoder: Encoder, messages: list[Message], start_answer: bool = False) -> str:
    try:
        return str(encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=start_answer))
    except Exception as error:  # templates raise through jinja whatever their authors wrote
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            where=", ".join(m["role"] for m in messages),
            hint="most templates want user and assistant in turns, after at most one system message",
        ) from error
