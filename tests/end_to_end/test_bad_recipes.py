"""Wrong recipes: each ends in a clear message and exit code 2, and leaves the disk as it was.

Every row goes through `slimtune check` and `slimtune train`; the rows at the end need the engine, so only through `train`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny

from slimtune.cli.main import main

GOOD = {"model": "MODEL", "data": "data", "method": "lora", "r": 2, "max_steps": 2, "batch_size": 4, "max_length": 48, "dtype": "float32"}


@dataclass(frozen=True)
class Bad:
    """One wrong recipe: changes to a good one (None takes a key out), the message, and what to write beside it."""

    name: str
    message: str
    change: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    text: str | None = None
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None


def rows(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


def pairs(completion: Any) -> str:
    return rows(*({"prompt": "red", "completion": completion} for _ in range(8)))


LABELLED = rows(*({"text": "red stone", "label": "yes" if i % 2 else "no"} for i in range(16)))

RECIPES = [
    # the file itself
    Bad("empty", "the recipe is empty", text=""),
    Bad("only comments", "the recipe is empty", text="# nothing\n"),
    Bad("a list", "`key: value` lines", text="- model\n- data\n"),
    Bad("a word", "`key: value` lines", text="hello\n"),
    Bad("unclosed bracket", r"line \d.*not valid YAML", text="model: [a\ndata: b\n"),
    Bad("tab", "not valid YAML", text="model:\tm\n\tdata: d\n"),
    Bad("two keys on a line", "not valid YAML", text="model: a data: b\n"),
    Bad("python object", "not valid YAML", text="model: !!python/object/apply:os.getcwd []\n"),
    Bad("key twice", r"line 2: `model` is given twice", text="model: a/b\nmodel: a/c\ndata: data\n"),
    Bad("not text", "UTF-8", text="\udcff\udcfe"),
    # keys
    Bad("unknown key", "unknown key `bach_size`; did you mean `batch_size`", {"bach_size": 3}),
    Bad("key of another tool", "did you mean `lr`", {"learning_rate": 3}),
    Bad("sections", "unknown key `train`", {"train": {"lr": 1}}),
    Bad("no model", "there is no `model`", {"model": None}),
    Bad("no data", "there is no `data`", {"data": None}),
    Bad("override without =", "write key=value", overrides=("lr",)),
    Bad("override of an unknown key", "did you mean `seed`", overrides=("sed=1",)),
    Bad("override is no YAML", "put quotes around it", overrides=("r=[1",)),
    # types and values
    Bad("text for a number", "lr: expected a number, got the text 'fast'", {"lr": "fast"}),
    Bad("true for a number", "epochs: expected a number, got true", {"epochs": True, "max_steps": None}),
    Bad("number for true or false", "group_by_length: expected true or false", {"group_by_length": 1}),
    Bad("fraction for a count", "batch_size: expected a whole number", {"batch_size": 2.5}),
    Bad("list for a text", "model: expected text", {"model": ["a", "b"]}),
    Bad("number for a text", "data: expected text", {"data": 7}),
    Bad("zero batch", "batch_size: must be at least 1", {"batch_size": 0}),
    Bad("negative lr", "lr: must be more than 0", {"lr": -1}),
    Bad("infinite lr", "lr: must be a finite number", {"lr": ".inf"}),
    Bad("lr not a number", "lr: must be a finite number", {"lr": ".nan"}),
    Bad("zero epochs", "epochs: must be more than 0", {"epochs": 0, "max_steps": None}),
    Bad("zero steps", "max_steps: must be at least 1", {"max_steps": 0}),
    Bad("epochs and steps", "either epochs or max_steps", {"epochs": 1}),
    Bad("negative seed", "seed: must be at least 0", {"seed": -1}),
    Bad("huge seed", "seed: must be less than", {"seed": 2**40}),
    Bad("valid fraction of one", "valid_fraction: must be less than 1", {"valid_fraction": 1}),
    Bad("odd warm-up", "warmup: a fraction below 1, or a whole number", {"warmup": 2.5}),
    Bad("warm-up to the end", "leave none", {"warmup": 2}),
    Bad("unknown dtype", "did you mean `bfloat16`", {"dtype": "bf16"}),
    Bad("unknown task", "task: must be one of", {"task": "causal"}),
    Bad("unknown schedule", "schedule: must be one of", {"schedule": "cosin"}),
    Bad("unknown quantisation", "quantize: must be one of", {"quantize": "fp4"}),
    Bad("full and quantised", "rounded weights cannot be trained", {"method": "full", "r": None, "quantize": "nf4"}),
    Bad("tiny max_length", "max_length: must be at least 4", {"max_length": 1}),
    Bad("template without text", "prompt_template: must contain {text}", {"prompt_template": "'Review:'"}),
    Bad("template with other braces", "prompt_template: must contain {text}", {"prompt_template": "'{text} {json}'"}),
    Bad("template with an open brace", "prompt_template:", {"prompt_template": "'{text} {'"}),
    Bad("template reaching inside", "prompt_template: must contain {text}", {"prompt_template": "'{text.__class__}'"}),
    Bad("completion without label", "completion_template: must contain {label}", {"completion_template": "'{text}'"}),
    Bad("empty column name", "text_column: must not be empty", {"text_column": "''"}),
    Bad("name with a slash", "name: use letters", {"name": "a/b"}),
    Bad("out is a file", "is a file; the run needs a folder", {"out": "recipe.yaml"}),
    # the method
    Bad("unknown method", "there is no 'lara'; did you mean `lora`", {"method": "lara"}),
    Bad("method as a list", "method: expected text", {"method": ["lora"]}),
    Bad("rank zero", "r must be at least 1", {"r": 0}),
    Bad("rank as text", "r must be int", {"r": "eight"}),
    Bad("rank true", "r must be int", {"r": True}),
    Bad("dropout of one", "dropout must be in", {"dropout": 1}),
    Bad("unknown init", "init must be one of", {"init": "magic"}),
    Bad("targets as a number", "targets must be", {"targets": 3}),
    Bad("option of another method", r"is an option of .*\blora\b", {"method": "bitfit", "r": None, "alpha": 2}),
    Bad("dead target", "'q_prj' matches no module", {"targets": "q_prj"}),
    Bad("one dead target of two", "'nothing' matches no module", {"targets": ["q_proj", "nothing"]}),
    Bad("target that is no regex", "not a valid regex", {"targets": "'re:('"}),
    Bad("target that cannot carry it", "cannot carry this op", {"targets": "self_attn"}),
    Bad("layers unreadable", "cannot read layers", {"layers": "some"}),
    Bad("layers out of range", "names no block", {"layers": "7-9"}),
    Bad("dead exclude", "exclude pattern 'nope' matches no module", {"exclude": "nope"}),
    Bad("everything excluded", "no module is left", {"targets": "q_proj", "exclude": "self_attn"}),
    # the model
    Bad("missing folder", "there is no file or folder", {"model": "./gone"}),
    Bad("missing gguf", "there is no file or folder", {"model": "gone.gguf"}),
    Bad("folder without a model", "has no config.json", {"model": "./data"}),
    Bad("a file as model", "not .gguf", {"model": "recipe.yaml"}),
    Bad("pypi without a version", "PACKAGE==VERSION#FILE", {"model": "'pypi:pkg#file'"}),
    Bad("pypi member outside", "not a path inside a package", {"model": "'pypi:pkg==1.0#../file'"}),
    Bad("a name with spaces", "neither a path nor a hub name", {"model": "my model"}),
    Bad("hub out of reach", "cannot be reached", {"model": "nobody/has-this-one"}),
    Bad("damaged gguf", "not a GGUF file", {"model": "x.gguf"}, files={"x.gguf": b"GGUF" + b"\0" * 50}),
    Bad("damaged config", "cannot load this model", {"model": "m"}, files={"m/config.json": "{"}),
    Bad("unknown architecture", "cannot load this model", {"model": "m"}, files={"m/config.json": '{"model_type": "none"}'}),
    Bad("encoder for chats", "cannot generate text", {"model": "BERT", "data": "chat.jsonl"},
        files={"chat.jsonl": rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})}),
    Bad("classifier without labels", "needs rows with text and label", {"task": "classification", "data": "p.jsonl"},
        files={"p.jsonl": pairs(" yes")}),
    # the data
    Bad("missing file", "there is no file or folder", {"data": "gone.jsonl"}),
    Bad("missing test file", "test_file: there is no file", {"test_file": "gone.jsonl"}),
    Bad("test file is a folder", "test_file: .*is a folder", {"test_file": "data"}),
    Bad("odd kind of file", "not a kind of file", {"data": "recipe.yaml"}),
    Bad("unknown builtin", "no data set called 'food'", {"data": "'builtin:food'"}),
    Bad("folder without data", "no data files", {"data": "./void"}, files={"void/readme.txt": "x"}),
    Bad("folder without train", "no training rows", {"data": "./void"}, files={"void/test.jsonl": LABELLED, "void/valid.jsonl": LABELLED}),
    Bad("empty data", "the file is empty", {"data": "e.jsonl"}, files={"e.jsonl": ""}),
    Bad("no rows", "no rows", {"data": "e.csv"}, files={"e.csv": "text,label\n"}),
    Bad("broken JSON", "row 2 is not valid JSON", {"data": "e.jsonl"}, files={"e.jsonl": '{"text": "a"}\n{"text\n'}),
    Bad("rows are lists", "row 1 is a list", {"data": "e.jsonl"}, files={"e.jsonl": "[1]\n[2]\n"}),
    Bad("ragged CSV", "row 2 has 3 fields", {"data": "e.csv"}, files={"e.csv": "text,label\na,b\na,b,c\n"}),
    Bad("parquet in name only", "parquet", {"data": "e.parquet"}, files={"e.parquet": b"nonsense"}),
    Bad("not UTF-8", "not text in UTF-8", {"data": "e.jsonl"}, files={"e.jsonl": b'{"text": "\xff"}\n'}),
    Bad("unknown format", "no known format", {"data": "e.jsonl"}, files={"e.jsonl": rows({"question": "a", "answer": "b"})}),
    Bad("column not there", "no known format", {"text_column": "review"}),
    Bad("null completion", "row 2: 'completion' is missing", {"data": "e.jsonl"}, files={"e.jsonl": pairs("a").split("\n")[0] + "\n" + pairs(None)}),
    Bad("empty text", "row 17: 'text' is empty", {"data": "e.jsonl"}, files={"e.jsonl": LABELLED + rows({"text": " ", "label": "yes"})}),
    Bad("number as text", "'text' is 5, not text", {"data": "e.jsonl"}, files={"e.jsonl": rows({"text": 5})}),
    Bad("label with a fraction", "label 0.5", {"data": "e.jsonl", "task": "classification"}, files={"e.jsonl": rows({"text": "a", "label": 0.5})}),
    Bad("mixed labels", "row 2: 'label' is a list, but in row 1 it is text", {"data": "e.jsonl"},
        files={"e.jsonl": rows({"text": "a", "label": "x"}, {"text": "a", "label": [1]})}),
    Bad("one label", "same label", {"data": "e.jsonl"}, files={"e.jsonl": rows(*[{"text": "a", "label": "x"}] * 9)}),
    Bad("unseen label", r"'maybe' \(row 1\)", {"test_file": "e.jsonl"}, files={"e.jsonl": rows({"text": "a", "label": "maybe"})}),
    Bad("test of another format", "no 'label' in these rows|no 'text'", {"test_file": "e.jsonl"}, files={"e.jsonl": pairs(" yes")}),
    Bad("chat without answers", "nothing to learn", {"data": "e.jsonl"}, files={"e.jsonl": rows({"messages": [{"role": "user", "content": "a"}]})}),
    Bad("chat without a template", "no chat template", {"data": "e.jsonl"},
        files={"e.jsonl": rows({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})}),
    Bad("longer than the model takes", "more than the model takes, 128", {"max_length": 4096}),
    Bad("completions that never fit", "no row fits", {"data": "e.jsonl"}, files={"e.jsonl": pairs("stone " * 100)}),
]  # fmt: skip

ENGINE = [
    Bad("loss is not a number at once", "not a number|NaN|nan|finite", prepare=lambda case: poison(case)),
    Bad("out holds something else", "not empty", {"out": "full"}, files={"full/thesis.txt": "mine"}),
    Bad("resume of nothing", "nothing to resume|no run|no checkpoint|start", overrides=("--resume",)),
]


def poison(case: Path) -> None:
    """Give the recipe a model whose weights are not numbers, as a damaged download has."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tiny.llama(case / "poisoned")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    recipe = case / "recipe.yaml"
    recipe.write_text(re.sub(r"^model: .*$", "model: poisoned", recipe.read_text(), flags=re.M))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.llama(root / "llama")
    tiny.bert(root / "bert")
    return root


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "400")
        from slimtune.train import hub

        patch.setattr(hub, "reachable", lambda: False)
        yield


def arrange(case: Path, bad: Bad, models: Path) -> None:
    tiny.reviews(case / "data")
    for name, content in bad.files.items():
        path = case / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.text is not None:
        (case / "recipe.yaml").write_bytes(bad.text.encode("utf-8", "surrogateescape"))
        return
    values = {key: value for key, value in {**GOOD, **bad.change}.items() if value is not None}
    values = {key: {"MODEL": str(models / "llama"), "BERT": str(models / "bert")}.get(str(v), v) for key, v in values.items()}
    lines = [f"{key}: {json.dumps(v) if isinstance(v, (bool, list, dict)) else v}\n" for key, v in values.items()]
    (case / "recipe.yaml").write_text("".join(lines))
    if bad.prepare is not None:
        bad.prepare(case)


def disk(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def expect(case: Path, bad: Bad, models: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrange(case, bad, models)
    before = disk(case)
    code = main([command, str(case / "recipe.yaml"), *bad.overrides])
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.search("^error: ", error, re.M), error
    assert re.search(bad.message, error, re.S) or bad.message in error, error
    assert "Traceback" not in error
    assert disk(case) == before


def test_there_are_enough() -> None:
    assert len(RECIPES) + len(ENGINE) >= 60
    assert len({bad.name for bad in RECIPES + ENGINE}) == len(RECIPES) + len(ENGINE)


def test_the_good_one_is_good(tmp_path: Path, models: Path) -> None:
    arrange(tmp_path, Bad("good", ""), models)
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 0


@pytest.mark.parametrize("bad", RECIPES, ids=lambda bad: bad.name)
def test_check_refuses(bad: Bad, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(tmp_path, bad, models, "check", capsys)


@pytest.mark.parametrize("bad", RECIPES + ENGINE, ids=lambda bad: bad.name)
def test_train_refuses(bad: Bad, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect(tmp_path, bad, models, "train", capsys)


@pytest.mark.parametrize("name", ["unknown key", "broken JSON", "dead target", "missing folder"])
def test_the_same_from_a_shell(name: str, tmp_path: Path, models: Path) -> None:
    bad = next(b for b in RECIPES if b.name == name)
    arrange(tmp_path, bad, models)
    before = disk(tmp_path)
    source = str(Path(__file__).resolve().parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "slimtune.cli.main", "train", "recipe.yaml", *bad.overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert disk(tmp_path) == before
