"""Conversations in every spelling that people have: what is learnt, what reaches the template, and what is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from small import CHATML, jsonl, tokenizer

from slimtune.core.errors import DataError
from slimtune.train import render as render_module
from slimtune.train.chat import end_of_turn
from slimtune.train.data import DataBundle, load_data
from slimtune.train.recipe import Recipe
from slimtune.train.tokens import IGNORE, Encoder

TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}: {{ t.function.parameters | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function.name }} ARGS</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_OBJECT, AS_TEXT = TOOLS.replace("ARGS", "{{ c.function.arguments | tojson }}"), TOOLS.replace("ARGS", "{{ '' + c.function.arguments }}")
PRINTS_NONE = AS_OBJECT.replace("m.content or ''", "m.content")
FORECAST = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


def load(folder: Path, rows: list[dict[str, Any]], template: str = CHATML, **keys: Any) -> tuple[DataBundle, list[str], list[str]]:
    """The data, each example's text, and of each what is learnt."""
    words = tokenizer(template)
    data = load_data(
        Recipe(model="m", data=str(jsonl(folder / "a.jsonl", rows)), **{"valid_fraction": 0.0, "max_length": 400, **keys}), words, "causal_lm"
    )
    texts = [str(words.decode(e["input_ids"])) for e in data.train]
    return data, texts, [str(words.decode([t for t in e["labels"] if t != IGNORE])) for e in data.train]


def said(*contents: str, **last: Any) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    turns[-1].update(last)
    return turns


def call(content: str | None, arguments: Any) -> dict[str, Any]:
    function = {"name": "forecast", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}


# ---- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, PRINTS_NONE], ids=["object", "text", "prints None"])
@pytest.mark.parametrize("arguments", [{"town": "Ur"}, '{"town": "Ur"}'], ids=["an object", "its JSON"])
def test_tools_and_calls_reach_every_kind_of_template(tmp_path: Path, template: str, arguments: Any) -> None:
    rows = [{"messages": [*said("weather?"), call(None, arguments)], "tools": [FORECAST]}]
    _, texts, learned = load(tmp_path, rows, template)
    assert 'forecast: {"type": "object", "properties": {"town": {"type": "string"}}}' in texts[0]
    assert learned == ['<call>forecast {"town": "Ur"}</call><|im_end|>']


def test_tools_of_one_row_do_not_get_the_keys_of_another(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {"numbers": {"type": "array"}}}}}
    rows = [{"messages": said("a", "b"), "tools": [tool]} for tool in (FORECAST, other)]
    _, texts, _ = load(tmp_path, rows, AS_OBJECT)
    assert "null" not in "".join(texts)
    assert ["town" in t for t in texts] == [True, False]


@pytest.mark.parametrize("content", ["", None])
def test_tools_and_calls_that_the_template_leaves_out_are_refused_and_the_hints_work(tmp_path: Path, content: str | None) -> None:
    turns = [*said("weather?"), call(content, {"town": "Ur"}), {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}]
    with pytest.raises(DataError, match="'tools', and the model's chat template does not write them") as caught:
        load(tmp_path, [{"messages": said("a", "b"), "tools": [FORECAST]}])
    assert "take 'tools' out" in caught.value.hint
    with pytest.raises(DataError, match="does not write such calls") as caught:
        load(tmp_path, [{"messages": turns}])
    assert "write each call into 'content'" in caught.value.hint
    written = [{k: v for k, v in m.items() if k != "tool_calls"} | ({"content": "forecast(Ur)"} if m.get("tool_calls") else {}) for m in turns]
    assert load(tmp_path, [{"messages": written}])[2] == ["forecast(Ur)<|im_end|>Sunny.<|im_end|>"]


# ---- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}], ids=str)
@pytest.mark.parametrize("marked", [False, True])
def test_a_message_that_is_not_to_be_learnt_has_no_loss(tmp_path: Path, off: dict[str, Any], marked: bool) -> None:
    said_by = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    body = said_by + "{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    template = CHATML.replace("{{ m.content }}<|im_end|>\n", body) if marked else CHATML
    rows = [{"messages": [*said("q", "WRONG", **off), *said("again", "right")]}]
    _, texts, learned = load(tmp_path, rows, template)
    assert learned == ["right<|im_end|>"]
    assert "WRONG" in texts[0]


def test_marks_of_the_template_are_right_beside_characters_of_several_bytes(tmp_path: Path) -> None:
    body = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    rows = [{"messages": said("héllo 🙂 日本", "ça 🙂🙂 日本語")}]
    _, _, learned = load(tmp_path, rows, CHATML.replace("{{ m.content }}<|im_end|>", body))
    assert learned == ["ça 🙂🙂 日本語<|im_end|>"]


WISHES = {
    "half a weight": ({"weight": 0.5}, r"message 2 has 'weight': 0.5; it can be 0 or 1"),
    "a word": ({"train": "no"}, "message 2 has 'train': 'no'; it can be true or false"),
    "two that differ": ({"train": True, "weight": 0}, "both to learn it and not to"),
    "nothing": ({"train": False}, "marked as not to be learnt"),
    "a picture": ({"content": [{"type": "image", "url": "x"}]}, "a part of type 'image'"),
    "an old call": ({"function_call": {"name": "f", "arguments": "{}"}}, "write it as 'tool_calls'"),
    "a call without a name": ({"tool_calls": [{"function": {}}]}, "a tool call without a function's name"),
    "arguments that are no JSON": ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments of its call of f are not valid JSON"),
    "no content": ({"content": None}, "message 2 has no text in 'content'"),
}


@pytest.mark.parametrize("case", WISHES)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = WISHES[case]
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, [{"messages": said("q", "a", **change)}])
    assert "row 1" in str(caught.value)


def test_a_user_that_asks_to_be_learnt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="message 1 is the user's and asks to be learnt"):
        load(tmp_path, [{"messages": [{"role": "user", "content": "q", "train": True}, *said("a", "b")[1:]]}])


def test_keys_of_messages_that_the_template_does_not_read_are_listed(tmp_path: Path) -> None:
    rows = [{"messages": said("q", "a", thinking="hm", name="Ann")}]
    assert "keys of messages that the chat template does not read: name, thinking" in load(tmp_path, rows)[0].notes
    assert not load(tmp_path, rows, CHATML.replace("{{ m.content }}", "{{ m.name }}{{ m.thinking }}{{ m.content }}"))[0].notes


def test_a_conversation_that_the_assistant_opens_learns_no_header(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": "s"}, *said("q", "hello")[1:]]}, {"messages": said("q", "hello")[1:]}]
    _, texts, learned = load(tmp_path, rows)
    assert learned == ["hello<|im_end|>"] * 2
    assert "<|im_start|>assistant\nhello" in texts[1]


# ---- templates that rewrite earlier turns ---------------------------------------------------------------------------

THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set c = m.content or '' %}{%- if m.role == 'assistant' %}{%- set c = c.split('</think>')[-1].lstrip() %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + c + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}{%- endif %}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_thinking_templates_learn_each_answer_after_what_the_model_will_see(tmp_path: Path) -> None:
    chat = said("q1", "first", "q2", "second")
    data, texts, learned = load(tmp_path, [{"messages": chat}], THINKING)
    assert learned == ["<think>\n\n</think>\n\nfirst<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]
    words = tokenizer(THINKING)
    for text, upto in zip(texts, (1, 3), strict=True):
        assert text.startswith(str(words.apply_chat_template(chat[:upto], tokenize=False, add_generation_prompt=True)))
    assert "1 conversations give 2 examples, one for each answer" in " ".join(data.notes)
    last_only = [*said("q1", "first", train=False), *said("q2", "second")]
    assert load(tmp_path, [{"messages": last_only}], THINKING)[2] == learned[1:]


def test_long_thinking_chats_still_lose_their_oldest_turns(tmp_path: Path) -> None:
    chat = said("q1 " * 40, "first", "q2", "second")
    _, texts, learned = load(tmp_path, [{"messages": chat}], THINKING, max_length=60)
    assert learned == ["<think>\n\n</think>\n\nsecond<|im_end|>"]
    assert "q1" not in texts[0]


# ---- other spellings ------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, dict[str, Any]] = {
    "role and content": {"messages": said("q", "a")},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "conversations with roles": {"conversations": said("q", "a")},
    "parts of text": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *said("q", "a")[1:]]},
    "prompt and completion": {"prompt": said("q"), "completion": said("q", "a")[1:]},
    "a prompt of messages and a text": {"prompt": said("q"), "completion": "a"},
    "Alpaca": {"instruction": "q", "input": "", "output": "a"},
    "Dolly": {"instruction": "q", "response": "a"},
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_gives_the_same_example(tmp_path: Path, case: str) -> None:
    data, texts, learned = load(tmp_path, [SPELLINGS[case]])
    assert data.format == "messages"
    assert learned == ["a<|im_end|>"]
    assert texts == [str(tokenizer().apply_chat_template(said("q", "a"), tokenize=False))]


def test_alpacas_input_is_below_the_instruction_also_with_the_columns_named(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": "A text.", "output": " Sum."}
    assert "user\nSum up.\n\nA text.<|im_end|>" in load(tmp_path, [row])[1][0]
    data, texts, _ = load(tmp_path, [row], prompt_column="instruction", completion_column="output")
    assert (data.format, texts) == ("prompt+completion", ["Sum up.\n\nA text. Sum.<|im_end|>"])


def test_answers_in_the_prompt_are_not_learnt(tmp_path: Path) -> None:
    row = {"prompt": said("q1", "early", "q2"), "completion": [{"role": "assistant", "content": "late"}]}
    assert load(tmp_path, [row])[2] == ["late<|im_end|>"]


def test_sharegpts_system_tools_and_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": json.dumps({"name": "forecast", "arguments": {"town": "Ur"}})},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Sunny."},
    ]
    row = {"conversations": turns, "system": "be kind", "tools": json.dumps([FORECAST["function"]])}
    _, texts, learned = load(tmp_path, [row], AS_OBJECT)
    assert learned == ['<call>forecast {"town": "Ur"}</call><|im_end|>Sunny.<|im_end|>']
    assert "system\nbe kind<|im_end|>" in texts[0]
    assert "forecast: {" in texts[0]
    with pytest.raises(DataError, match="'system' and the system message of the conversation differ"):
        load(tmp_path, [{**row, "conversations": [{"from": "system", "value": "be rude"}, *turns]}], AS_OBJECT)


# ---- templates ------------------------------------------------------------------------------------------------------


def test_a_template_that_loops_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "LIMIT", 0.3)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHATML
    began = time.perf_counter()
    with pytest.raises(DataError, match="seems to loop"):
        load(tmp_path, [{"messages": said("q", "a")}], endless)
    assert time.perf_counter() - began < 60  # it would be hours


def test_the_trained_end_is_the_templates_not_the_tokenizers() -> None:
    words = tokenizer()
    words.eos_token = "<|endoftext|>"
    assert end_of_turn(Encoder(words)) == words.convert_tokens_to_ids("<|im_end|>")
    words.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert end_of_turn(Encoder(words)) is None


def test_a_template_whose_answers_have_no_end_is_named(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert any("does not learn where to stop" in note for note in load(tmp_path, [{"messages": said("q", "a")}], plain)[0].notes)
    outside = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
    )
    assert any("does not learn where to stop" in note for note in load(tmp_path, [{"messages": said("q", "a")}], outside)[0].notes)
