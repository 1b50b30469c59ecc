"""One conversation of a data set in one spelling: role and content as texts, calls as objects, `train: false` where nothing is to be learnt.

Read: role / content or from / value (ShareGPT); content that is null beside a call, or a list of text parts; `weight` 0 or 1, `train` and
`loss` true or false; calls whose arguments are an object or its JSON; `tools` as a list or its JSON. All else is refused by name.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
ROLES = {"system", "developer", "user", "assistant", "tool"}
_SHAREGPT = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
_ASKS = ("weight", "train", "loss")  # what a message may say about its own loss


def chat_row(row: dict[str, Any], messages: Any) -> dict[str, Any]:
    """Return {"messages": JSON, "tools": JSON or None} of one row; `system` and `tools` are the row's own.

    Raises:
        ValueError: with what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a list of messages" if messages else "'messages' is empty")
    turns = [_message(i, m) for i, m in enumerate(messages, 1)]
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError("'system' is not text")
    if system and turns[0]["role"] not in {"system", "developer"}:
        turns.insert(0, {"role": "system", "content": system})
    elif system and turns[0]["content"] != system:
        raise ValueError("'system' and the system message of the conversation differ")
    said = [m for m in turns if m["role"] == "assistant"]
    if not any((m["content"] or "").strip() or m.get("tool_calls") for m in said):
        empty = "every message of the assistant is empty" if said else "no message of the assistant"
        raise ValueError(f"{empty}, so there is nothing to learn")
    if not any(m.get("train", True) for m in said):
        raise ValueError("every message of the assistant is marked as not to be learnt")
    return {"messages": json.dumps(turns, ensure_ascii=False), "tools": _tools(row.get("tools"))}


def _message(i: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} is not an object with role and content")
    if "role" not in message and isinstance(message.get("from"), str):
        message = {"role": _SHAREGPT.get(message["from"], message["from"]), "content": message.get("value"), **message}
        if message.pop("from") == "function_call":
            message |= {"tool_calls": [_call_in_text(i, message["content"])], "content": ""}
        message.pop("value", None)
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"message {i} has no 'role'")
    if role not in ROLES:
        raise ValueError(f"message {i} has the role {role!r}, not one of {', '.join(sorted(ROLES))}")
    made = {k: v for k, v in message.items() if k not in _ASKS and (v is not None or k == "content")}
    calls = [_call(i, c) for c in made.pop("tool_calls", None) or []]
    if calls:
        if role != "assistant":
            raise ValueError(f"message {i} is the {role}'s, and only the assistant calls tools")
        made["tool_calls"] = calls
    if "function_call" in made:
        raise ValueError(f"message {i} has 'function_call'; write it as 'tool_calls': a list of {{'function': {{'name', 'arguments'}}}}")
    made["content"] = _content(i, made.get("content"), bool(calls))
    if not _learns(i, message):
        made["train"] = False
    return made


def _content(i: int, content: Any, calls: bool) -> str | None:
    if content is None and calls:
        return None
    if isinstance(content, list) and content:
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
                kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"message {i} has a part of type {kind!r}; only parts of text can be trained on")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {i} has no text in 'content'")
    return content


def _learns(i: int, message: Message) -> bool:
    """Tell whether a message is to be learnt, from its `weight`, `train` or `loss`."""
    asked = {}
    for key in _ASKS:
        value = message.get(key)
        if value is None:
            continue
        if value not in ((0, 1) if key == "weight" else (True, False)) or (key != "weight" and not isinstance(value, bool)):
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise ValueError(f"message {i} has {key!r}: {value!r}; it can be {wanted} (parts of a loss are not weighted)")
        asked[key] = bool(value)
    if len(set(asked.values())) > 1:
        raise ValueError(f"message {i} says both to learn it and not to: {asked}")
    if message["role"] != "assistant" and asked.get("train", asked.get("loss", False)):
        raise ValueError(f"message {i} is the {message['role']}'s and asks to be learnt; the loss is on what the assistant says")
    return all(asked.values())


def _call(i: int, call: Any) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {i} has a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError(f"message {i}: the arguments of its call of {function['name']} are not valid JSON") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"message {i}: the arguments of its call of {function['name']} are not an object")
    rest = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _call_in_text(i: int, text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"message {i} is a function_call, and its value is not the JSON of a name and arguments") from None


def _tools(tools: Any) -> str | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("'tools' is text, and not valid JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) and isinstance(t.get("function", t).get("name"), str) for t in tools):
        raise ValueError("'tools' is not a list of functions with names")
    return json.dumps([t if "function" in t else {"type": "function", "function": t} for t in tools], ensure_ascii=False)
