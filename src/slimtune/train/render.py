"""A conversation written out by a model's chat template: tools and calls reach it in the spelling it understands, or are refused by name.

Templates differ in what they take: arguments of a call as an object or as its JSON, no content beside a call as null or as "". Each
spelling is tried, and one counts only if the call is really in the text. What a template leaves out would be lost without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

from slimtune.core.errors import DataError
from slimtune.train.tokens import Encoder

Message = dict[str, Any]
LIMIT = 30.0  # seconds for one conversation; it takes about a millisecond
_ELSE = "a_name_that_no_tool_has"


def template_of(encoder: Encoder, tools: list[Any] | None) -> str:
    """Return the source of the chat template.

    Raises:
        DataError: there is none.
    """
    template = encoder.tokenizer.chat_template
    if template is None:
        raise DataError(
            "the model has no chat template, so messages cannot be written out",
            where=str(encoder.tokenizer.name_or_path),
            hint="use an instruct model, or data with prompt and completion",
        )
    if isinstance(template, str):
        return template
    return str(encoder.tokenizer.get_chat_template(tools=tools))


def render(encoder: Encoder, messages: list[Message], tools: list[Any] | None = None, start_answer: bool = False) -> str:
    """Return a conversation as text.

    Args:
        encoder: with the tokenizer.
        messages: role, content and what else the template may read.
        tools: functions that the model may call.
        start_answer: with the header of the assistant's next answer.

    Raises:
        DataError: the template refuses it, or does not come to an end.
    """
    try:
        with _limited(LIMIT):
            return str(encoder.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=start_answer))
    except _TooLong:
        raise DataError(
            f"the model's chat template has not written this conversation after {LIMIT:g} seconds: it seems to loop",
            where=str(encoder.tokenizer.name_or_path),
            hint="use data with prompt and completion, which need no template",
        ) from None
    except Exception as error:  # templates raise through jinja whatever their authors wrote
        raise DataError(
            f"the model's chat template refuses this conversation: {error}",
            where=", ".join(m["role"] for m in messages),
            hint="most templates want user and assistant in turns, after at most one system message",
        ) from error


def as_written(encoder: Encoder, messages: list[Message], tools: list[Any] | None) -> list[Message]:
    """Return the messages in the spelling of tools' calls that the template writes.

    Raises:
        DataError: it leaves out the tools or the calls.
    """
    spelled = _spelling(encoder, messages, tools)
    if tools and render(encoder, spelled, tools) == render(encoder, spelled):
        raise DataError(
            "the rows have 'tools', and the model's chat template does not write them",
            where=str(encoder.tokenizer.name_or_path),
            hint="use a model whose template takes tools, or take 'tools' out of the rows",
        )
    return spelled


def _spelling(encoder: Encoder, messages: list[Message], tools: list[Any] | None) -> list[Message]:
    if not any(m.get("tool_calls") for m in messages):
        return messages
    refused: DataError | None = None
    for null, text in itertools.product((True, False), (False, True)):
        spelled = [_spelled(m, null, text) for m in messages]
        try:
            whole = render(encoder, spelled, tools)
            other = render(encoder, [_renamed(m) for m in spelled], tools)
            literal = null and whole == render(encoder, [{**m, "content": "None"} if m.get("content") is None else m for m in spelled], tools)
        except DataError as error:
            refused = refused or error
            continue
        missing_null = null and any(m.get("content") is None for m in spelled)
        calls = [c["function"] for m in messages for c in m.get("tool_calls", [])]
        as_python = any(f["arguments"] and str(f["arguments"]) in whole for f in calls)
        if other.count(_ELSE) >= len(calls) and not as_python and not (literal and missing_null):
            return spelled
    if refused is not None:
        raise refused
    raise DataError(
        "a message calls a tool, and the model's chat template does not write such calls",
        where=str(encoder.tokenizer.name_or_path),
        hint="use a model whose template writes tool calls, or write each call into 'content'",
    )


def _spelled(message: Message, null: bool, text: bool) -> Message:
    made = dict(message)
    if made.get("content") is None and not null:
        made["content"] = ""
    if text and "tool_calls" in made:
        made["tool_calls"] = [
            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)}} for c in made["tool_calls"]
        ]
    return made


def _renamed(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [{**c, "function": {**c["function"], "name": _ELSE}} for c in message["tool_calls"]]}


# ---- templates that do not end --------------------------------------------------------------------------------------
class _TooLong(BaseException):  # not an Exception: jinja and transformers must not swallow it
    pass


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` after so many seconds; without effect where there are no alarms (Windows, other threads, one that is set already)."""
    alarms = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not alarms or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
