"""Files as people have them: CSV that is text, other separators, packed files, parts, marks of byte order; and what is wrong said by its row."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from small import jsonl, reviews, tokenizer

from slimtune.core.errors import DataError
from slimtune.train import tables
from slimtune.train.data import DataBundle, load_data, read_rows
from slimtune.train.data_notes import answers_text
from slimtune.train.recipe import Recipe
from slimtune.train.tables import Examples, token_counts


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


def recipe(data: Path, **keys: Any) -> Recipe:
    return Recipe(model="m", data=str(data), **{"valid_fraction": 0.0, **keys})


def load(data: Path, task: Any = "causal_lm", **keys: Any) -> DataBundle:
    return load_data(recipe(data, **keys), tokenizer(), task)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# ---- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"item {i},{('007', '0042', '7')[i % 3]}\n" for i in range(12)))
    data = load(path)
    assert data.labels == ["007", "7", "0042"]
    assert data.raw["train"]["label"][:3] == ["007", "0042", "7"]
    assert "labels that look alike are different classes: '007', '7'" in data.notes
    sums = write(tmp_path / "b.csv", "prompt,completion\n" + "".join(f'"{i}+{i}=",{2 * i}\n' for i in range(6)))
    assert load(sums).raw["train"]["completion"][:3] == ["0", "2", "4"]


def test_a_word_after_many_numbers_is_a_class(tmp_path: Path) -> None:
    rows = "".join(f"item {i},{i % 2 if i < 10_500 else 'other'}\n" for i in range(10_600))
    assert read_rows(recipe(write(tmp_path / "a.csv", "text,label\n" + rows))).labels == ["0", "1", "other"]


def test_codes_in_two_files_are_the_same_codes(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "text,label\n" + "".join(f"item {i},{('0123', 'A12', '0456')[i % 3]}\n" for i in range(9)))
    test = write(tmp_path / "b.csv", "text,label\nitem,0123\nitem,0456\n")
    assert load(train, test_file=str(test)).raw["test"]["label"][:] == ["0123", "0456"]


@pytest.mark.parametrize(("separator", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.csv"), ("|", "a.csv"), ("\t", "a.tsv")])
def test_the_separator_is_seen_in_the_header(tmp_path: Path, separator: str, name: str) -> None:
    text = "".join(separator.join(row) + "\n" for row in [("text", "label"), ('"a, b; c"', "x"), ("plain", "y")])
    assert load(write(tmp_path / name, text)).raw["train"].to_list() == [{"text": "a, b; c", "label": "x"}, {"text": "plain", "label": "y"}]


def test_bytes_before_the_header_and_other_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufefftext,label\r\na,x\r\n\r\nb,y\r\n")
    assert load(path).raw["train"].to_list() == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    rows = load(write(tmp_path / "b.jsonl", '\ufeff{"text": "a\u2028b"}\r\n')).raw["train"]
    assert rows[0]["text"] == "a\u2028b"  # a line separator inside a text is no end of a line


CSV_FAULTS = {
    "every row has a comma too many": ("text,label\none, two,x\nthree, four,y\n", r"row 1 has 3 fields, the header has 2 \(line 2"),
    "a field is missing": ("text,label\na,x\nb\n", r"row 2 has 1 fields, the header has 2 \(line 3"),
    "a quote stays open": ('text,label\na,x\n"b,y\nc,z\n', "row 2, from line 3 of the file on: a quote is opened and not closed"),
    "words after a quoted text": ('text,label\n"a" b,x\n', "row 1, from line 2 .*quotes are not in order"),
    "a name twice": ("text,text,label\na,b,c\n", "'text' twice"),
    "a NUL": ("text,label\na,x\nb\0,y\n", "line 3 holds a NUL byte"),
    "only a header": ("text,label\n", "no rows"),
    "a row after lines in quotes": ('text,label\n"a\nb\nc",x\nd\n', r"row 2 has 1 fields, the header has 2 \(line 5"),
}


@pytest.mark.parametrize("case", CSV_FAULTS)
def test_faults_of_csv_are_named_by_row_and_line(tmp_path: Path, case: str) -> None:
    text, message = CSV_FAULTS[case]
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / "a.csv", text))
    assert "a.csv" in caught.value.where


def test_a_long_field_is_read_and_does_not_hide_a_bad_row(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)
    long = f'text,label\n"{"x" * 200_000}",a\nshort,b\n'
    assert len(load(write(tmp_path / "a.csv", long)).raw["train"]["text"][0]) == 200_000
    with pytest.raises(DataError, match="row 3 has 3 fields"):
        load(write(tmp_path / "b.csv", long + "one, two,b\n"))


def test_the_hint_for_a_ragged_row_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="put quotes around a text that holds the separator"):
        load(write(tmp_path / "a.csv", "text,label\none, two,x\nb,y\n"))
    assert load(write(tmp_path / "a.csv", 'text,label\n"one, two",x\nb,y\n')).raw["train"]["text"][0] == "one, two"


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\nné,x\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        load(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"text,label\na,x\n" + "né,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"row 3 is not text in UTF-8 \(line 3"):
        load(tmp_path / "b.csv")
    (tmp_path / "c.jsonl.gz").write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(DataError, match="not a sound gzip file"):
        load(tmp_path / "c.jsonl.gz")


# ---- packed, in parts, in folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.ndjson"])
def test_packed_files_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = reviews(6)
    text = json.dumps(rows) if ".json." in name else "".join(json.dumps(row) + "\n" for row in rows)
    if ".csv" in name:
        text = "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load(tmp_path / name).raw["train"].to_list() == rows


def test_a_folder_of_parts_is_one_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in (1, 2):
        jsonl(folder / f"part_{k}.jsonl", reviews(5))
    assert load(folder).raw["train"].to_list() == reviews(5) * 2
    jsonl(folder / "part_3.jsonl", [{"text": "a", "label": None}])
    with pytest.raises(DataError, match=r"part_3.jsonl, row 1: 'label' is missing"):
        load(folder)
    write(folder / "part_4.csv", "text,label\na,great\n")
    with pytest.raises(DataError, match="of several kinds"):
        load(folder)
    assert len(load(folder, train_file=str(folder / "part_1.jsonl")).train) == 5  # as the hint says


def test_files_of_no_split_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    jsonl(folder / "train.jsonl", reviews(5))
    jsonl(folder / "more.jsonl", reviews(5))
    data = load(folder)
    assert len(data.train) == 5
    assert "train: files that are no split and are not read: more.jsonl" in data.notes


def test_a_file_that_has_moved_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "here.jsonl", reviews(5))
    with pytest.raises(DataError, match=r"no longer there; in that folder: here.jsonl") as caught:
        load(tmp_path / "gone.jsonl")
    assert "data=FILE" in caught.value.hint
    with pytest.raises(DataError, match="no longer there"):
        load(tmp_path / "here.jsonl", test_file=str(tmp_path / "gone.csv"))


def test_parquet_keeps_names_of_classes_and_leaves_out_nulls_that_fill_gaps(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    table = Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]}, features=Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    )
    table.to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").raw["train"]["label"][:] == ["yes", "no", "yes", "no"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
    other = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "string"}}}}}
    turns = [{"role": "user", "content": "q", "weight": None}, {"role": "assistant", "content": "a", "weight": 1}]
    Dataset.from_list([{"messages": turns, "tools": [tool]}, {"messages": turns, "tools": [other]}]).to_parquet(tmp_path / "b.parquet")
    rows = read_rows(recipe(tmp_path / "b.parquet")).splits["train"]
    assert [json.loads(row["tools"]) for row in rows] == [[tool], [other]]
    assert json.loads(rows[0]["messages"]) == [{k: v for k, v in m.items() if k != "weight"} for m in turns]


# ---- what is not used, and hints ------------------------------------------------------------------------------------


def test_every_column_that_is_not_used_is_listed(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2, "id": i, "\x1b[2Jsource": "x"} for i in range(8)]
    rows[7]["late"] = 1
    notes = load(jsonl(tmp_path / "a.jsonl", rows)).notes
    assert "train: not used: id, \\x1b[2Jsource, late" in notes


HINTED: dict[str, list[dict[str, Any]]] = {
    "an index before the text": [{"id": str(i), "review": f"tea {i} was fine", "stars": str(i % 5)} for i in range(40)],
    "two texts": [{"q": f"question {i}?", "a": f"the answer is {i}"} for i in range(12)],
    "a label without its text": [{"label": "ab"[i % 2], "body": f"words {i}"} for i in range(12)],
    "a prompt without its answer": [{"prompt": f"q{i}", "reply": f"this is {i}"} for i in range(12)],
    "an answer without its prompt": [{"query": f"q{i}", "completion": f"this is {i}"} for i in range(12)],
    "a chat by another name": [{"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(3)],
    "preference pairs": [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)],
    "preference chats": [
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}], "rejected": []} for i in range(3)
    ],
    "preference texts": [{"chosen": f"Human: a\n\nAssistant: b{i}", "rejected": "no"} for i in range(3)],
}


@pytest.mark.parametrize("case", HINTED)
def test_a_hint_that_names_columns_works(tmp_path: Path, case: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", HINTED[case])
    with pytest.raises(DataError) as caught:
        load(path)
    settings = dict(re.findall(r"(\w+_column): (\w+)", caught.value.hint))
    assert settings, caught.value.hint
    assert settings.get("prompt_column") not in {"id", "stars", "label"}
    assert len(load(path, **settings).train) == len(HINTED[case])


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_tokens_take_four_bytes_each_and_large_tables_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "tea " * 100 + str(i)} for i in range(2_500)])
    small = load(path)
    monkeypatch.setattr(tables, "IN_MEMORY", 100_000)
    large = load(path)
    assert large.train.cache_files
    assert not small.train.cache_files
    assert large.train[2_499] == small.train[2_499]
    counts = token_counts(large.train)
    assert counts == [len(row["input_ids"]) for row in small.train]
    assert small.train.data.nbytes <= 8.1 * sum(counts) + 8 * 4 * 2_501  # input_ids and labels, and where each row begins
    some = large.train.select([7, 3])
    assert token_counts(some) == [counts[7], counts[3]]
    assert [row["input_ids"] for row in Examples(some)[:1]] == [small.train[7]["input_ids"]]


def test_what_there_is_to_answer_is_said(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", reviews(8))
    assert answers_text(load(path), "causal_lm") == "answers: great, other"
    assert answers_text(load(path, "classification"), "classification") == "2 classes: 0 = great, 1 = other"
    free = jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": f"c{i}"} for i in range(30)])
    assert "no accuracy" in answers_text(load(free), "causal_lm")


def test_circled_digits_are_words(tmp_path: Path) -> None:
    assert load(jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "③①②"[i % 3]} for i in range(9)])).labels == ["①", "②", "③"]
