"""Data: formats, masks, truncation, splits, errors with row numbers, batches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import jsonl, reviews, tokenizer

from slimtune.core.errors import DataError
from slimtune.train.collate import Collator, LengthGroupedSampler, length_grouped_order
from slimtune.train.data import DataBundle, load_data, read_rows
from slimtune.train.formats import find_candidates
from slimtune.train.recipe import Recipe
from slimtune.train.tokens import IGNORE, Encoder

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "great tea"},
    {"role": "user", "content": "bread"},
    {"role": "assistant", "content": "stale"},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


def load(data: Path, task: str = "causal_lm", words: Any = None, longest: int | None = None, **keys: Any) -> DataBundle:
    recipe = Recipe(model="m", data=str(data), **{"valid_fraction": 0.0, **keys})
    return load_data(recipe, words or tokenizer(), task, longest)  # type: ignore[arg-type]


def learned(words: Any, example: dict[str, Any]) -> str:
    return str(words.decode([i for i in example["labels"] if i != IGNORE]))


def whole(words: Any, example: dict[str, Any]) -> str:
    return str(words.decode(example["input_ids"]))


# ---- formats and masks ----------------------------------------------------------------------------------------------


def test_prompt_and_completion_learn_the_completion_only(tmp_path: Path) -> None:
    words = tokenizer()
    data = load(jsonl(tmp_path / "a.jsonl", [{"prompt": "Review: tea\nAnswer:", "completion": " great"}] * 3), words=words)
    assert data.format == "prompt+completion"
    assert whole(words, data.train[0]) == "Review: tea\nAnswer: great<|im_end|>"
    assert learned(words, data.train[0]) == " great<|im_end|>"
    assert len(data.train[0]["labels"]) == len(data.train[0]["input_ids"])


def test_a_boundary_inside_a_token_splits_as_generation_will(tmp_path: Path) -> None:
    words = tokenizer()
    assert len(words("\n\n")["input_ids"]) == 1  # "\n" + "\n" merge, so joint tokenisation would hide the boundary
    example = load(jsonl(tmp_path / "a.jsonl", [{"prompt": "system\n", "completion": "\nhello"}]), words=words).train[0]
    at = len(words("system\n")["input_ids"])
    assert example["input_ids"][:at] == words("system\n")["input_ids"]
    assert learned(words, example) == "\nhello<|im_end|>"


def test_a_tokenizer_that_starts_with_a_special_token_keeps_it_once(tmp_path: Path) -> None:
    words = tokenizer(bos=True)
    example = load(jsonl(tmp_path / "a.jsonl", [{"prompt": "tea", "completion": " great"}]), words=words).train[0]
    assert whole(words, example) == "<s>tea great<|im_end|>"
    assert learned(words, example) == " great<|im_end|>"


def test_texts_that_bring_their_own_special_tokens_keep_them_once(tmp_path: Path) -> None:
    words = tokenizer(bos=True)
    rows = [{"prompt": "<s>tea", "completion": " great<|im_end|>"}, {"prompt": "tea", "completion": " great"}]
    pairs = load(jsonl(tmp_path / "a.jsonl", rows), words=words).train
    assert [whole(words, e) for e in pairs] == ["<s>tea great<|im_end|>"] * 2
    assert [learned(words, e) for e in pairs] == [" great<|im_end|>"] * 2
    texts = load(jsonl(tmp_path / "b.jsonl", [{"text": "<s>the tea<|im_end|>"}, {"text": "the tea"}]), words=words).train
    assert [whole(words, e) for e in texts] == ["<s>the tea<|im_end|>"] * 2


def test_a_template_that_writes_the_first_token_itself_keeps_it_once(tmp_path: Path) -> None:
    words = tokenizer("{{ bos_token }}" + str(tokenizer().chat_template), bos=True)
    words.bos_token = "<s>"
    example = load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), words=words).train[0]
    assert example["input_ids"] == words.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert example["input_ids"].count(words.bos_token_id) == 1


def test_the_end_is_learnt_where_it_is_the_padding_too(tmp_path: Path) -> None:
    words = tokenizer()
    words.pad_token = words.eos_token
    rows = load(jsonl(tmp_path / "a.jsonl", [{"prompt": "tea", "completion": " x" * n} for n in (1, 9)]), words=words).train
    batch = Collator(words.pad_token_id)(rows.to_list())
    assert (batch["labels"] == words.eos_token_id).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in rows]


def test_chats_learn_what_the_assistant_says(tmp_path: Path) -> None:
    words = tokenizer()
    assert "generation %" not in words.chat_template
    example = load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), words=words).train[0]
    assert whole(words, example) == words.apply_chat_template(CHAT, tokenize=False)
    assert learned(words, example) == "great tea<|im_end|>stale<|im_end|>"


def test_chats_with_the_generation_keyword_give_the_same_mask(tmp_path: Path) -> None:
    plain = tokenizer()
    said = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    body = f"{{% if m.role == 'assistant' %}}{said}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}{{{{ '\\n' }}}}"
    marked = tokenizer(plain.chat_template.replace("{{ m.content }}<|im_end|>\n", body))
    assert "generation %" in marked.chat_template
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    assert load(path, words=plain).train[0] == load(path, words=marked).train[0]


def test_a_template_that_rewrites_earlier_turns_gives_one_example_for_each_answer(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}{{ m.role }}: {% if m.role != 'assistant' or loop.last %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words = tokenizer(forgetful)
    data = load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), words=words)
    assert [learned(words, e) for e in data.train] == ["great tea<|im_end|>", "stale<|im_end|>"]
    before = words.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert whole(words, data.train[1]).rstrip() == before + "stale<|im_end|>"  # what the model sees when it writes the second answer
    assert len(data.raw["train"]) == 2
    assert "1 conversations give 2 examples" in " ".join(data.notes)


def test_an_answer_that_the_template_cannot_write_after_its_own_header_is_refused_and_the_hint_works(tmp_path: Path) -> None:
    opened = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: <think>{% endif %}"
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), words=tokenizer(opened))
    assert "prompt and completion" in caught.value.hint
    load(jsonl(tmp_path / "b.jsonl", [{"prompt": "assistant: <think>", "completion": "</think>stale"}]), words=tokenizer(opened))


def test_a_template_that_refuses_and_a_missing_one_say_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="no system here"):
        load(path, words=tokenizer("{{ raise_exception('no system here') }}"))
    with pytest.raises(DataError, match="no chat template"):
        load(path, words=tokenizer(None))


def test_text_learns_every_token(tmp_path: Path) -> None:
    words = tokenizer()
    data = load(jsonl(tmp_path / "a.jsonl", [{"text": "the tea was great"}]), words=words)
    assert data.format == "text"
    assert data.train[0]["labels"] == data.train[0]["input_ids"]
    assert whole(words, data.train[0]) == "the tea was great<|im_end|>"


def test_labels_make_prompts_for_a_causal_lm_and_classes_for_a_classifier(tmp_path: Path) -> None:
    path, words = jsonl(tmp_path / "a.jsonl", reviews()), tokenizer()
    data = load(path, words=words, prompt_template="Q: {text}\nA:", completion_template=" {label}!")
    assert whole(words, data.train[1]) == "Q: the tea number 1 was fine\nA: other!<|im_end|>"
    assert (data.labels, data.candidates, data.train[1]["label"]) == (["great", "other"], [" great!", " other!"], 1)
    classes = load(path, "classification", words=words)
    assert set(classes.train.column_names) == {"input_ids", "label"}
    assert whole(words, classes.train[0]) == "the tea number 0 was fine"
    assert classes.candidates is None


def test_numbered_and_true_false_labels_keep_their_order(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": i % 12} for i in range(24)]
    assert load(jsonl(tmp_path / "a.jsonl", rows), "classification").labels == [str(i) for i in range(12)]
    rows = [{"text": "a", "label": i % 2 == 0} for i in range(4)]
    assert load(jsonl(tmp_path / "b.jsonl", rows), "classification").labels == ["false", "true"]


def test_few_answers_are_candidates_and_free_text_is_not() -> None:
    assert find_candidates(["yes", "no", "no", "yes", "no", "no", "no", "no"]) == ["no", "yes"]
    assert find_candidates(["a", "b", "c", "d"]) is None  # each once: a small open-ended set
    assert find_candidates([str(i) for i in range(400)]) is None
    assert find_candidates(["yes"] * 40) is None


def test_other_names_and_other_columns(tmp_path: Path) -> None:
    rows = [{"question": "tea?", "text": "not this", "answer": " great", "id": 3}]
    data = load(jsonl(tmp_path / "a.jsonl", rows), prompt_column="question", completion_column="answer")
    assert data.raw["train"][0] == {"prompt": "tea?", "completion": " great"}


# ---- files and splits -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": 'a, "b"\nNA', "label": "NA"}, {"text": "null", "label": "other"}] * 6
    table = Dataset.from_list(rows)
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    table.to_csv(tmp_path / "c.csv")
    table.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.tsv").write_text("text\tlabel\nx y\tNA\nz\tother\n")
    first = load(tmp_path / "a.jsonl").raw["train"].to_list()
    assert first == rows
    for name in ("b.json", "c.csv", "d.parquet"):
        assert load(tmp_path / name).raw["train"].to_list() == rows
    assert load(tmp_path / "e.tsv").raw["train"].to_list() == [{"text": "x y", "label": "NA"}, {"text": "z", "label": "other"}]


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "eval", "val"])
def test_a_folder_of_splits(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "train.jsonl", reviews(8))
    jsonl(tmp_path / f"{name}.jsonl", reviews(4))
    jsonl(tmp_path / "test.jsonl", reviews(6))
    data = load(tmp_path)
    assert (len(data.train), len(data.valid or []), len(data.test or [])) == (8, 4, 6)


def test_files_named_one_by_one_win(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", reviews(8))
    other = jsonl(tmp_path / "mine.jsonl", reviews(4))
    data = load(tmp_path, test_file=str(other), valid_file=str(other))
    assert (len(data.train), len(data.valid or []), len(data.test or [])) == (8, 4, 4)
    jsonl(tmp_path / "training.jsonl", reviews(4))
    with pytest.raises(DataError, match="could be the train split"):
        load(tmp_path)


def test_held_out_and_limited_rows_do_not_depend_on_the_seed_and_do_not_overlap(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", reviews(100))
    one, two = (read_rows(Recipe(model="m", data=str(path), valid_fraction=0.2, limit_train=30, seed=seed)).splits for seed in (0, 1))
    assert (len(one["train"]), len(one["valid"])) == (30, 20)
    assert one["train"].to_list() == two["train"].to_list()
    assert not set(one["train"]["text"]) & set(one["valid"]["text"])


def test_the_packaged_reviews_load(tmp_path: Path) -> None:
    rows = read_rows(Recipe(model="m", data="builtin:fine_foods"))
    assert {split: len(r) for split, r in rows.splits.items()} == {"train": 3800, "valid": 200, "test": 1000}
    assert rows.labels == ["great", "other"]


# ---- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "start", "end"), [("head", "START", "…"), ("tail", "…", "END"), ("ends", "START", "END")])
def test_long_texts_lose_text_and_never_the_template_or_the_answer(tmp_path: Path, keep: str, start: str, end: str) -> None:
    words = tokenizer()
    text = "START" + " tea" * 60 + " END"
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": "great"}, {"text": "x", "label": "other"}] * 4)
    data = load(path, words=words, max_length=40, truncate=keep, prompt_template="Review: {text}\nAnswer:")
    said = whole(words, data.train[0])
    assert said.startswith("Review: ")
    assert said.endswith("\nAnswer: great<|im_end|>")
    assert ("START" in said) == (start == "START")
    assert ("END" in said) == (end == "END")
    assert 30 <= len(data.train[0]["input_ids"]) <= 40
    assert data.notes == ["train: 4 of 8 rows were shortened to max_length: 40 tokens"]


def test_rows_whose_completion_does_not_fit_are_counted_not_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": " x" * 80}, {"prompt": "p", "completion": " ok"}]
    data = load(jsonl(tmp_path / "a.jsonl", rows), max_length=16)
    assert len(data.train) == 1
    assert data.raw["train"]["completion"] == [" ok"]
    assert "1 of 2 rows were left out" in data.notes[0]
    with pytest.raises(DataError, match="no row fits"):
        load(jsonl(tmp_path / "b.jsonl", rows[:1]), max_length=16)


def test_long_chats_lose_their_oldest_turns(tmp_path: Path) -> None:
    words = tokenizer()
    chat = [{"role": "system", "content": "be kind"}, *CHAT]
    full = len(words.apply_chat_template(chat, tokenize=False, return_dict=False))
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    length = len(load(path, words=words, max_length=512).train[0]["input_ids"])
    data = load(path, words=words, max_length=length - 1)
    assert full
    assert whole(words, data.train[0]) == words.apply_chat_template([chat[0], *chat[3:]], tokenize=False)
    assert "shortened" in data.notes[0]
    with pytest.raises(DataError, match="no row fits"):
        load(path, words=words, max_length=8)


def test_a_classifier_keeps_its_special_tokens(tmp_path: Path) -> None:
    words = tokenizer(bos=True)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "tea " * 50, "label": i % 2} for i in range(4)])
    ids = load(path, "classification", words=words, max_length=10).train[0]["input_ids"]
    assert len(ids) == 10
    assert ids[0] == words.convert_tokens_to_ids("<s>")


def test_more_than_the_model_takes_is_an_error_and_the_default_is_not(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", reviews(8))
    with pytest.raises(DataError, match="more than the model takes, 64"):
        load(path, longest=64, max_length=100)
    assert load(path, longest=64).max_length == 64
    assert load(path).max_length == 512


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=60), completion=st.text(min_size=1, max_size=20))
def test_parts_are_the_text_and_the_prompt_is_as_if_alone(prompt: str, completion: str) -> None:
    try:
        f"{prompt}{completion}".encode()
    except UnicodeEncodeError:
        return
    words = tokenizer()
    first, second = Encoder(words).parts([prompt, completion])
    assert first == words(prompt, add_special_tokens=False)["input_ids"]
    assert words.decode([*first, *second]) == prompt + completion


# ---- errors ---------------------------------------------------------------------------------------------------------

BAD = {
    "empty file": ("", "empty"),
    "only blank lines": ("\n\n", "rows|empty|cannot"),
    "not json": ('{"text": "a"}\n{"text": \n', "row 2 is not valid JSON"),
    "not objects": ('"a"\n"b"\n', "row 1 is text"),
    "mixed types": ('{"text": "a"}\n{"text": {"b": 1}}\n', "row 2"),
    "unknown keys": ('{"foo": "a"}\n', "no known format: foo"),
    "half a pair": ('{"prompt": "a"}\n', "prompt without completion"),
    "missing in one row": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "row 2: 'completion' is missing"),
    "null": ('{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}\n', "row 2: 'prompt' is missing"),
    "empty completion": ('{"prompt": "a", "completion": ""}\n', "row 1: 'completion' is empty"),
    "numbers for text": ('{"text": 3}\n', "row 1: 'text' is 3, not text"),
    "a score among words": ('{"text": "a", "label": "x"}\n{"text": "b", "label": 0.5}\n', "row 2: 'label' is a number"),
    "numbers and their texts": ('{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n', "row 2: 'label' is text, but in row 1 it is a number"),
    "an object as label": ('{"text": "a", "label": {"b": 1}}\n', "row 1: the label is"),
    "NaN as label": ('{"text": "a", "label": 1}\n{"text": "a", "label": NaN}\n', "^row 2: the label is nan"),
    "a key twice": ('{"text": "a", "text": "b"}\n', "row 1 .*the key 'text' is there twice"),
    "half a character": ('{"text": "\\ud83d"}\n', "row 1 holds half of a character"),
    "one label": ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', "same label"),
    "no role": ('{"messages": [{"content": "a"}]}\n', "message 1 has no 'role'"),
    "odd role": ('{"messages": [{"role": "robot", "content": "a"}]}\n', "role 'robot'"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}\n', "nothing to learn"),
    "messages as text": ('{"messages": "hi"}\n', "not a list of messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "a.jsonl")
    assert "a.jsonl" in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1: .*row 5: .*and 15 more rows"):
        load(jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 20))


def test_unseen_labels_and_other_keys_in_a_later_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", reviews(8))
    jsonl(tmp_path / "test.jsonl", [*reviews(2), {"text": "a", "label": "graet"}])
    with pytest.raises(DataError, match=r"'graet' \(row 3\)"):
        load(tmp_path)
    jsonl(tmp_path / "test.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="no 'label'"):
        load(tmp_path)


def test_broken_csv_parquet_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\na,b,c,d\n")
    with pytest.raises(DataError, match="row 2 has 4 fields, the header has 2"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="parquet"):
        load(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="row 2 is not text in UTF-8"):
        load(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load(tmp_path / "empty")


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_eight_and_masked() -> None:
    batch = Collator(pad_id=7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "label": 1}, {"input_ids": [4] * 9, "labels": [4] * 9, "label": 0}])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [7] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"][0].tolist() == [-100, 2, 3] + [IGNORE] * 13
    left = Collator(pad_id=7, left=True)([{"input_ids": [1, 2, 3], "label": 1}])
    assert left["input_ids"][0].tolist() == [7] * 5 + [1, 2, 3]
    assert torch.equal(left["labels"], torch.tensor([1]))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 99), max_size=300), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_order_is_a_permutation_and_repeats(lengths: list[int], batch: int, seed: int) -> None:
    order = length_grouped_order(lengths, batch, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == length_grouped_order(lengths, batch, seed)


def test_grouping_saves_padding_and_changes_with_the_epoch() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(1000)]

    def padded(order: list[int]) -> int:
        return sum(8 * max(lengths[j] for j in order[i : i + 8]) for i in range(0, len(order), 8))

    sampler = LengthGroupedSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert padded(first) < 1.1 * sum(lengths) < padded(list(range(1000)))
    sampler.set_epoch(1)
    assert list(sampler) != first
