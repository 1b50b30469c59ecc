"""One rule for the head of a model that classifies: it trains beside the adapter unless that is declined, and the report says which."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import slimtune as st
from slimtune.core.task_head import task_heads
from slimtune.testing import zoo

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
IDS = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def llama(cls: Any = LlamaForSequenceClassification, **more: Any) -> Any:
    return cls(LlamaConfig(**SMALL, pad_token_id=0, **more)).eval()


MODELS: dict[str, tuple[Any, set[str]]] = {
    "BERT": (zoo.bert, {"classifier"}),
    "RoBERTa": (zoo.roberta, {"classifier.dense", "classifier.out_proj"}),
    "DistilBERT": (zoo.distilbert, {"pre_classifier", "classifier"}),
    "Llama": (llama, {"score"}),
    "Llama, answers": (lambda: llama(LlamaForQuestionAnswering), {"qa_outputs"}),
    "DeBERTa": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL)), {"pooler.dense", "classifier"}),
    "ViT": (lambda: ViTForImageClassification(ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4)),
            {"classifier"}),
    "inside a wrapper": (lambda: nn.ModuleDict({"encoder": zoo.bert()}), {"encoder.classifier"}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_the_head_of_a_classifier_trains_by_default(case: str) -> None:
    make, heads = MODELS[case]
    model = make()
    sizes = sum(p.numel() for path in heads for p in model.get_submodule(path).parameters())
    report = st.attach(model, st.LoRA(r=2, targets="attention"))
    assert {row.path for row in report.rows if row.path in heads} == heads
    assert sum(row.trainable for row in report.rows if row.path in heads) == sizes
    assert any(note.startswith("head") and f"in full: {sizes:,} parameters" in note and all(h in note for h in heads) for note in report.notes)


@pytest.mark.parametrize("declined", [(), None, []], ids=repr)
@pytest.mark.parametrize("case", MODELS)
def test_it_stays_frozen_where_that_is_asked_for_and_the_report_says_so(case: str, declined: Any) -> None:
    make, heads = MODELS[case]
    report = st.attach(make(), st.LoRA(r=2, targets="attention", train_modules=declined))
    assert not {row.path for row in report.rows} & heads
    assert any("frozen as the base has it" in note and all(h in note for h in heads) for note in report.notes)


@pytest.mark.parametrize(
    "make",
    [zoo.llama, zoo.gpt2, zoo.t5, lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
     lambda: nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 4)})],
    ids=["llama", "gpt2", "t5", "plain", "only by name"],
)  # fmt: skip
def test_no_other_model_has_such_a_head(make: Any) -> None:
    model = make()
    assert task_heads(model) == ()
    assert not any("head" in note for note in st.attach(model, st.LoRA(r=2)).notes)
    assert st.adapters(model)["default"].spec == st.LoRA(r=2)


@pytest.mark.parametrize(
    "spec",
    [
        st.DoRA(of=st.LoRA(r=2)), st.DoRA(of=st.VeRA(r=2)), st.Gated(), st.Union(of=(st.LoRA(r=2), st.IA3())), st.Union(of=(st.DoRA(), st.BitFit())),
        st.PromptTuning(tokens=2), st.PrefixTuning(p=2), st.PTuningV2(p=2), st.IA3(), st.BitFit(), st.VeRA(r=2), st.LayerNormTuning(),
        st.TrainableTokens(tokens=(3,)), st.MAM(), st.AdaLoRA(total_steps=10),
    ],
    ids=lambda s: s.method,
)  # fmt: skip
def test_the_rule_is_the_same_for_every_method(spec: st.Spec) -> None:
    import dataclasses

    report = st.attach(zoo.bert(), spec)
    assert [row.total for row in report.rows if row.path == "classifier"] == [66], "once, whatever the recipe is made of"
    without = st.attach(zoo.bert(), dataclasses.replace(spec, train_modules=()))
    assert "classifier" not in {row.path for row in without.rows}
    assert without.trainable == report.trainable - 66


def test_what_is_named_is_what_trains() -> None:
    report = st.attach(zoo.bert(), st.LoRA(r=2, train_modules=["pooler.dense"]))
    rows = {row.path for row in report.rows}
    assert "bert.pooler.dense" in rows
    assert "classifier" not in rows
    outer = st.attach(zoo.bert(), st.DoRA(of=st.LoRA(r=2), train_modules="pooler.dense"))
    assert "classifier" not in {row.path for row in outer.rows}, "what is given outside decides what auto means inside"
    inner = st.attach(zoo.bert(), st.Union(of=(st.LoRA(r=2, train_modules="classifier"),), train_modules=()))
    assert "classifier" in {row.path for row in inner.rows}, "what a member names itself stays"


def test_a_head_that_the_method_adapts_itself_is_not_trained_twice() -> None:
    model = zoo.bert()
    report = st.attach(model, st.LoRA(r=2, targets=("query", "classifier")))
    assert [row.path for row in report.rows].count("classifier") == 1
    assert not any("head" in note for note in report.notes)
    assert {type(op).__name__ for (path, _), op in st.adapters(model)["default"].ops.items() if path == "classifier"} == {"LoRAOp"}


def test_a_head_tied_to_a_table_never_trains() -> None:
    model = llama()
    model.config.num_labels = 50
    model.score = nn.Linear(16, 50, bias=False)
    model.score.weight = model.model.embed_tokens.weight
    assert task_heads(model) == ()


def test_every_adapter_has_its_own_head_and_the_base_keeps_its() -> None:
    model = zoo.bert().eval()
    with torch.no_grad():
        base = model(IDS).logits
        for name, by in (("a", 1.0), ("b", 2.0)):
            st.attach(model, st.LoRA(r=2), name=name)
            for path, p in st.adapters(model)[name].named_parameters():
                if path.startswith("classifier"):
                    p.add_(by)
        mixed = None
        with st.use(model, rows=["a", "b", None]):
            mixed = model(IDS).logits
        for i, which in enumerate(("a", "b", None)):
            with st.use(model, which):
                torch.testing.assert_close(mixed[i], model(IDS).logits[i])
        torch.testing.assert_close(mixed[2], base[2])
        assert (mixed[0] - base[0]).abs().max() > 0.1
        assert (mixed[1] - mixed[0]).abs().max() > 0.1


def test_it_learns_and_comes_back_onto_a_model_with_another_random_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.bert()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.LoRA(r=2))
    head = [p.clone() for path, p in st.adapters(model)["default"].named_parameters() if path.startswith("classifier")]
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.1))
    for _ in range(2):
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
    now = [p for path, p in st.adapters(model)["default"].named_parameters() if path.startswith("classifier")]
    assert all((p - q).abs().max() > 0 for p, q in zip(now, head, strict=True))
    want = model.eval()(IDS).logits
    st.save(model, tmp_path)
    other = zoo.bert().eval()
    other.load_state_dict({k: torch.randn_like(v) if k.startswith("classifier") else v for k, v in state.items()})
    note = "head `classifier` belongs to the adapter in full: 66 parameters"
    assert note in st.load(other, tmp_path).notes
    torch.testing.assert_close(other(IDS).logits, want)
    theirs = zoo.bert()
    theirs.load_state_dict({k: torch.randn_like(v) if k.startswith("classifier") else v for k, v in state.items()})
    reference = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    torch.testing.assert_close(reference(input_ids=IDS).logits, want)


def test_the_reference_trains_the_same_modules_under_its_task() -> None:
    theirs = peft.get_peft_model(zoo.bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    full = {n.split("modules_to_save.default.")[0].split(".")[-2] for n, p in theirs.named_parameters() if p.requires_grad and "modules_to_save" in n}
    ours = st.attach(zoo.bert(), st.LoRA(r=2, targets=["query"]))
    assert full == {row.path for row in ours.rows if "query" not in row.path} == {"classifier"}


def test_specs_of_older_files_keep_their_meaning() -> None:
    old = {"method": "dora", "targets": None, "layers": None, "exclude": [], "train_modules": [],
           "of": {"method": "lora", "targets": "all-linear", "layers": None, "exclude": [], "train_modules": "head", "r": 4}}  # fmt: skip
    assert [part.method for part in st.Spec.from_dict(old).parts()] == ["dora", "dense"]
    plain = {**old["of"], "train_modules": []}
    assert st.Spec.from_dict(plain).train_modules == ()
    assert [row.path for row in st.attach(zoo.bert(), st.Spec.from_dict(plain)).rows if row.path == "classifier"] == []
    tagged = st.Spec.from_dict({"method": "p_tuning_v2", "train_modules": "task-head"})
    assert len(tagged.parts()) == 2


def test_what_auto_meant_is_in_the_file(tmp_path: Path) -> None:
    model = zoo.bert()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    from slimtune.files.container import own_metadata, read_tensors

    about = own_metadata(read_tensors(tmp_path / "adapter_model.safetensors"))
    assert about is not None
    assert about["spec"]["train_modules"] == ["classifier"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
