"""What slimtune 0.1.0 wrote still loads, answers the same, merges, and its run folder still opens and measures the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from old_files import EXPECTED, OLD, SPECS, base, tokens
from safetensors.torch import load_file

import slimtune as st
from slimtune.train.reopen import reopen, write_merged

MERGES = sorted(set(SPECS) - {"prompt_tuning"})


@pytest.mark.parametrize("name", sorted(SPECS))
def test_an_adapter_of_0_1_0_loads_and_answers_the_same(name: str) -> None:
    model = base(name)
    st.load(model, OLD / name)
    torch.testing.assert_close(model(tokens()).logits, load_file(OLD / EXPECTED)[name], rtol=1e-4, atol=1e-5)
    assert st.report(model, name).name == name


@pytest.mark.parametrize("name", MERGES)
def test_an_adapter_of_0_1_0_merges(name: str, tmp_path: Path) -> None:
    model = base(name)
    st.load(model, OLD / name)
    st.merge(model, name)
    torch.testing.assert_close(model(tokens()).logits, load_file(OLD / EXPECTED)[name], rtol=1e-4, atol=1e-4)
    st.unmerge(model)
    st.save(model, tmp_path, name=name)
    old, new = load_file(OLD / name / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = shutil.copytree(OLD, tmp_path / "old")
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("FOLDER", str(folder)))
    return folder / "run"


def test_a_run_folder_of_0_1_0_opens_and_measures_the_same(run: Path) -> None:
    opened = reopen(run, rows=True)
    figures = opened.job.evaluate(opened.job.held_out()).figures()
    for measure in json.loads((run / "results.json").read_text())["measures"]:
        assert figures[measure["name"]] == pytest.approx(measure["after"], abs=1e-4), measure


def test_a_run_folder_of_0_1_0_merges(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened = reopen(run, rows=False)
    ids = torch.arange(5, 21).view(2, 8)
    want = opened.job.model(input_ids=ids).logits
    write_merged(opened, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(plain(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
