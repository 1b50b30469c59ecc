"""Modules that the checkpoint lacked are in the adapter's file, so that it fits any model made from that checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

import slimtune as st
from slimtune.core.errors import MismatchError
from slimtune.core.fresh import fresh_modules
from slimtune.testing.subject import fill

IDS = torch.arange(12).view(2, 6) + 3
NEW = {"bert.pooler.dense", "classifier"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    BertForMaskedLM(BertConfig(**shape, max_position_embeddings=32)).save_pretrained(folder)
    return folder


def model(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


def test_what_is_new_is_known(checkpoint: Path) -> None:
    found = model(checkpoint, 0)
    assert fresh_modules(found) == NEW
    assert fresh_modules(found.half().to("cpu")) == NEW
    torch.manual_seed(0)
    assert fresh_modules(type(found)(found.config)) == set(), "of a model that was not loaded nothing is known"


@pytest.mark.parametrize("targets", [("query", "value"), "all-linear"], ids=str)
def test_an_adapter_beside_new_modules_loads_under_any_seed(checkpoint: Path, targets: Any, tmp_path: Path) -> None:
    first = model(checkpoint, 0)
    report = st.attach(first, st.LoRA(r=2, targets=targets))
    assert "bert.pooler.dense` (new: not in the checkpoint)" in str(report)
    fill(first, "default")
    want = first(IDS).logits
    st.save(first, tmp_path)
    assert '"peft_type": "LORA"' in (tmp_path / "adapter_config.json").read_text()
    second = model(checkpoint, 1)
    assert not torch.allclose(second.bert.pooler.dense.weight, first.bert.pooler.dense.weight)
    st.load(second, tmp_path)
    torch.testing.assert_close(second(IDS).logits, want, rtol=1e-5, atol=1e-5)
    st.merge(second, keep=False)
    torch.testing.assert_close(second(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert fresh_modules(second) == NEW, "merged weights are no newer than they were"


def test_the_reference_reads_such_a_file(checkpoint: Path, tmp_path: Path) -> None:
    import peft

    first = model(checkpoint, 0)
    st.attach(first, st.LoRA(r=2, targets=("query",)))
    fill(first, "default")
    st.save(first, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(model(checkpoint, 1), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(IDS).logits, first(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_bare_body_as_well(checkpoint: Path, tmp_path: Path) -> None:
    def body(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModel.from_pretrained(checkpoint).eval()

    first, second = body(0), body(1)
    st.attach(first, st.LoRA(r=2, targets=("query",)))
    st.save(first, tmp_path)
    st.load(second, tmp_path)
    torch.testing.assert_close(second(IDS).pooler_output, first(IDS).pooler_output, rtol=1e-5, atol=1e-5)


def test_without_them_the_report_and_the_error_name_them_and_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    first = model(checkpoint, 0)
    report = st.attach(first, st.LoRA(r=2, targets=("query",), train_modules=("classifier",)))
    assert "`bert.pooler.dense` is random" in str(report)
    fill(first, "default")
    want = first(IDS).logits
    st.save(first, tmp_path / "a")
    with pytest.raises(MismatchError, match=r"bert\.pooler\.dense of this model is random") as found:
        st.load(model(checkpoint, 1), tmp_path / "a")
    assert "relax" not in found.value.hint
    again = model(checkpoint, 0)  # as the hint says: under the seed of that run, kept together by a merge
    st.load(again, tmp_path / "a")
    st.merge(again, out=tmp_path / "merged")
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(IDS).logits, want, rtol=1e-4, atol=1e-5)
    second = model(checkpoint, 3)  # and as it says next
    st.attach(second, st.LoRA(r=2, targets=("query",), train_modules="auto"))
    st.save(second, tmp_path / "b")
    st.load(model(checkpoint, 4), tmp_path / "b")
