"""Every block of docs/coming-from-peft.md runs, and what its tables say of names and defaults is so."""

import dataclasses
import re
from pathlib import Path

import peft
import pytest

import slimtune as st
from slimtune.core.reference_names import ELSEWHERE, OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-peft.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_blocks_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 7
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)


def rows(heading: str) -> list[list[str]]:
    part = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_name_of_ours_on_the_page_exists() -> None:
    for name in re.findall(r"\bst\.([A-Za-z_]+)", TEXT):
        assert hasattr(st, name), name


def test_the_defaults_are_as_the_page_says() -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig)}
    ours = {f.name: f.default for f in dataclasses.fields(st.LoRA)}
    assert (theirs["r"], theirs["lora_alpha"], theirs["lora_dropout"], theirs["bias"]) == (8, 8, 0.0, "none")
    assert (theirs["use_rslora"], theirs["use_dora"], theirs["init_lora_weights"]) == (False, False, True)
    assert (ours["r"], ours["alpha"], ours["dropout"], ours["targets"], ours["init"]) == (8, None, 0.0, "all-linear", "kaiming")
    assert (ours["train_modules"], ours["rank_stabilised"]) == ("auto", False)
    assert (st.PromptTuning().tokens, st.PrefixTuning().p) == (20, 20)


def test_every_name_of_theirs_in_the_table_is_told_in_a_hint() -> None:
    table = rows("Names and defaults")
    assert len(table) > 12
    for row in table:
        for name in re.findall(r"`(\w+)[=`]", row[0]):
            assert name in {*OPTIONS, *ELSEWHERE} or name in {f.name for f in dataclasses.fields(st.LoRA)}, name
            assert name in {f.name for c in (peft.LoraConfig, peft.PromptTuningConfig) for f in dataclasses.fields(c)}, name


def test_verbs_of_the_reference_exist_there() -> None:
    verbs = {name for row in rows("Verbs") for name in re.findall(r"model\.(\w+)\(", row[0])}
    assert len(verbs) > 8
    have = {*dir(peft.PeftModel), *dir(peft.LoraModel)}
    assert verbs <= have, verbs - have
