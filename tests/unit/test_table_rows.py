"""Every row of a table of tokens belongs to the base: rows drawn anew are seen, told by number, and can be carried as the hint says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune as st
from slimtune.core.errors import MismatchError
from slimtune.files.fingerprint import Fingerprint, fingerprint
from slimtune.files.table_rows import TableRows
from slimtune.testing.subject import fill

IDS = torch.tensor([[3, 4, 101, 7], [5, 102, 9, 109]])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def base(rows: int = 110, seed: int = 0, tie: bool = False, mean: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, tie_word_embeddings=tie)
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=mean)
    return model


def saved(model: Any, folder: Path, spec: st.Spec | None = None) -> torch.Tensor:
    st.attach(model, spec or st.LoRA(r=2, targets=("q_proj",)))
    fill(model, "default")
    st.save(model, folder)
    with torch.no_grad():
        return model(IDS.clamp(max=model.config.vocab_size - 1)).logits


@pytest.mark.parametrize("tie", [False, True])
def test_new_rows_drawn_under_another_seed_are_another_base(tie: bool, tmp_path: Path) -> None:
    want = saved(base(tie=tie), tmp_path)
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight holds other rows, among 10") as found:
        st.load(base(seed=7, tie=tie), tmp_path)
    assert "model.save_pretrained" in found.value.hint
    assert "TrainableTokens" in found.value.hint
    notes = st.load(base(seed=7, tie=tie), tmp_path, relax="base").notes
    assert any("holds other rows" in note for note in notes)
    again = base(tie=tie)
    assert st.load(again, tmp_path).notes == []
    torch.testing.assert_close(again(IDS).logits, want)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("row", [0, 50, 99])
def test_a_single_row_is_seen_in_either_table(name: str, row: int, tmp_path: Path) -> None:
    saved(base(100), tmp_path)
    other = base(100)
    other.get_submodule(name).weight.data[row] = 9.0
    with pytest.raises(MismatchError, match=name):
        st.load(other, tmp_path)


def test_another_model_altogether_gets_no_advice_about_rows(tmp_path: Path) -> None:
    saved(base(), tmp_path)
    other = base(seed=7)
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(MismatchError, match="for another base") as found:
        st.load(other, tmp_path)
    assert "TrainableTokens" not in found.value.hint


def test_rows_that_the_file_holds_are_not_compared(tmp_path: Path) -> None:
    lora = st.LoRA(r=2, targets=("q_proj",))
    tokens = st.Union(of=(lora, st.TrainableTokens(tokens=tuple(range(100, 110)), head="train")))
    full = st.LoRA(r=2, targets=("q_proj",), train_modules=["embed_tokens", "lm_head"])  # as the hint says
    for i, spec in enumerate((tokens, full)):
        want = saved(base(), tmp_path / str(i), spec)
        fresh = base(seed=7)
        st.load(fresh, tmp_path / str(i))
        torch.testing.assert_close(fresh(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_rows_drawn_closely_around_the_mean_do_as_well_as_each_other(tmp_path: Path) -> None:
    want = saved(base(mean=True), tmp_path)
    fresh = base(seed=7, mean=True)
    assert not torch.equal(fresh.lm_head.weight, base(mean=True).lm_head.weight)
    st.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(IDS).logits, want, rtol=1e-3, atol=1e-3)


def test_a_file_without_sums_loads_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("slimtune.files.fingerprint.tables", lambda model, found: [])  # as slimtune wrote them before
        saved(base(), tmp_path)
    assert b'"rows\\":' not in (tmp_path / "adapter_model.safetensors").read_bytes()
    st.load(base(), tmp_path)
    st.load(base(seed=7), tmp_path)  # it cannot tell


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_rounding_is_no_other_row_but_ten_drawn_anew_are(a: torch.dtype, b: torch.dtype) -> None:
    torch.manual_seed(0)
    for scale, shift in ((1.0, 0.0), (0.02, 0.5), (1e-6, 0.0)):
        table = torch.randn(20_000, 8) * scale + shift * scale
        other = table.clone()
        other[-10:] = torch.randn(10, 8) * scale * 3
        one = TableRows.of(table.to(a))
        assert one.differs(TableRows.of(table.to(b))) == []
        if scale > 1e-6:
            assert one.differs(TableRows.of(other.to(b))) == [(19_375, 20_000)]


def test_rows_that_changed_places_are_other_rows() -> None:
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    other = table.clone()
    other[[40, 41]] = table[[41, 40]]
    assert TableRows.of(table).differs(TableRows.of(other)) == [(40, 42)]


@pytest.mark.parametrize("rows", [1, 5, 33, 100, 257])
def test_any_row_is_told_by_its_range(rows: int) -> None:
    table = torch.ones(rows, 3)
    for row in {0, rows // 2, rows - 1}:
        other = table.clone()
        other[row] = 2.0
        ((first, end),) = TableRows.of(table).differs(TableRows.of(other))
        assert first <= row < end


def test_they_are_small_in_a_file_and_come_back() -> None:
    found = fingerprint(base())
    text = json.dumps(found.to_dict()["rows"])
    assert len(text) < 1000
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))).other_rows(fingerprint(base())) == {}


@pytest.mark.parametrize("broken", [[], [[3]], {"a": 3}, {"a": [3, "float32", "%"]}, {"a": [1, "int32", "AAAAAAAAAAA="]}, {"a": [0, "float32", ""]}])
def test_a_broken_one_is_an_error_of_ours(broken: Any) -> None:
    if broken == []:
        broken = "x"
    with pytest.raises(st.SlimtuneError, match="cannot be read"):
        Fingerprint.from_dict(fingerprint(nn.Linear(2, 2)).to_dict() | {"rows": broken})
