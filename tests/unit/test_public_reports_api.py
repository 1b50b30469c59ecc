"""What people reported of adapters elsewhere (peft and its neighbors), tried on the verbs and options here; the address stands with each."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMultipleChoice, LlamaConfig, LlamaForSequenceClassification, LlamaModel

import slimtune as st
from slimtune.testing import zoo

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
IDS = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(0))


def shake(model: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for p in st.adapters(model)[name].parameters():
            p.add_(torch.randn_like(p) * 0.1)


def other_head(make: Any, state: dict[str, torch.Tensor], head: str) -> Any:
    """The same body under a head that is random anew, as `from_pretrained` makes it each time."""
    model = make().eval()
    model.load_state_dict({k: torch.randn_like(v) if k.startswith(head) else v for k, v in state.items()})
    return model


def test_a_lora_on_a_new_head_does_not_load_onto_another_new_head(tmp_path: Path) -> None:
    """huggingface/peft#577: the head was named among the targets by mistake, and predictions are random after loading."""
    model = zoo.bert()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.LoRA(r=2, targets=["query", "classifier"]))
    st.save(model, tmp_path)
    with pytest.raises(st.MismatchError, match="classifier"):
        st.load(other_head(zoo.bert, state, "classifier"), tmp_path)


@pytest.mark.parametrize("case", ["multiple choice", "llama"])
def test_predictions_are_the_same_after_loading(case: str, tmp_path: Path) -> None:
    """huggingface/peft#756 (multiple choice), #876 and huggingface/transformers#26160 (score), sentence-transformers#3980."""

    def make() -> Any:
        if case == "llama":
            return LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=0))
        return BertForMultipleChoice(BertConfig(**SMALL))

    head = "score" if case == "llama" else "classifier"
    ids = IDS if case == "llama" else IDS.view(1, 2, 5)
    model = make().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.LoRA(r=2))
    shake(model)
    want = model(ids).logits
    st.save(model, tmp_path)
    other = other_head(make, state, head)
    assert not torch.allclose(other(ids).logits, want, atol=1e-4)
    st.load(other, tmp_path)
    torch.testing.assert_close(other(ids).logits, want)


def test_one_wrong_target_among_good_ones_is_an_error() -> None:
    """huggingface/peft#1959, bghira/SimpleTuner#766: only a list without any hit was refused."""
    with pytest.raises(st.TargetError, match="'FAKE_TARGET_MODULE' matches no module"):
        st.attach(zoo.llama(), st.LoRA(targets=["q_proj", "FAKE_TARGET_MODULE"]))
    with pytest.raises(st.TargetError, match=r"names no module|matches no module"):
        st.attach(zoo.llama(), st.LoRA(targets=["q_proj"], exclude=["FAKE"]))


def test_members_of_a_list_may_be_regexes() -> None:
    """huggingface/peft#2964, #1206."""
    report = st.attach(zoo.t5(), st.LoRA(targets=[r".*decoder.*\.q", r".*decoder.*\.v"]))
    assert report.rows
    assert all("decoder" in row.path and row.path[-1] in "qv" for row in report.rows)


def test_layers_of_a_bare_body() -> None:
    """huggingface/peft#2155: `layers_to_transform` found nothing in LlamaModel, whose blocks have no name in front of them."""
    report = st.attach(LlamaModel(LlamaConfig(**SMALL)), st.LoRA(targets=["q_proj"], layers=[0, 2]))
    assert [row.path for row in report.rows] == ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]


def test_a_target_outside_of_all_blocks_is_not_lost_to_layers() -> None:
    """huggingface/peft#1024: `lm_head` with `layers_to_transform` was left out without a word."""
    model = zoo.llama()
    with pytest.raises(st.TargetError, match="'lm_head' lies in no block") as caught:
        st.attach(model, st.LoRA(targets=["q_proj", "lm_head"], layers=[1]))
    assert "st.Union" in caught.value.hint
    report = st.attach(model, st.Union(of=[st.LoRA(targets=["q_proj"], layers=[1]), st.LoRA(targets="lm_head")]))
    assert [row.path for row in report.rows] == ["model.layers.1.self_attn.q_proj", "lm_head"]


def test_other_layers_in_encoder_and_decoder() -> None:
    """huggingface/peft#2165."""
    spec = st.Union(of=[st.LoRA(targets=r"re:encoder.*\.q", layers="last:1"), st.LoRA(targets=r"re:decoder.*SelfAttention\.q")])
    model = zoo.t5()
    paths = [row.path for row in st.attach(model, spec).rows]
    blocks = {side: {p.split("block.")[1].split(".")[0] for p in paths if p.startswith(side)} for side in ("encoder", "decoder")}
    assert len(blocks["encoder"]) == 1 < len(blocks["decoder"])


def test_loading_one_adapter_leaves_the_other_as_frozen_or_live_as_it_was(tmp_path: Path) -> None:
    """huggingface/peft#1374, #2759, #3487, #3580: activating or loading made frozen adapters train."""
    source = zoo.llama()
    st.attach(source, st.LoRA(r=2), name="x")
    st.save(source, tmp_path)
    model = zoo.llama()
    model.load_state_dict({k: v for k, v in source.state_dict().items() if k in model.state_dict()})
    st.load(model, tmp_path, name="frozen")
    views = st.adapters(model)
    st.load(model, tmp_path, name="live", trainable=True)
    assert (views["frozen"].trainable, views["live"].trainable) == (False, True)
    st.use(model, ["frozen", "live"])
    assert (views["frozen"].trainable, views["live"].trainable) == (False, True)
    st.use(model, "frozen")
    assert not views["frozen"].trainable


def test_going_on_trains_the_head_as_well(tmp_path: Path) -> None:
    """huggingface/peft#1894: `is_trainable=True` left the saved module frozen."""
    model = zoo.bert()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    again = zoo.bert()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if k in again.state_dict()})
    report = st.load(again, tmp_path, trainable=True)
    assert "head `classifier` trains in full: 66 parameters" in report.notes


def test_a_second_adapter_by_the_same_regex() -> None:
    """huggingface/peft#1111: names had moved with the first adapter, so the regex matched nothing."""
    model = zoo.llama()
    first = st.attach(model, st.LoRA(targets=r"re:model\.layers\.0\..*q_proj"), name="a")
    second = st.attach(model, st.LoRA(targets=r"re:model\.layers\.0\..*q_proj"), name="b")
    assert [r.path for r in first.rows] == [r.path for r in second.rows] == ["model.layers.0.self_attn.q_proj"]


def test_a_repository_with_a_dot_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """superlinked/sie#193: the repository's name became the adapter's, and a module's name cannot hold a dot."""
    import huggingface_hub

    net = nn.Sequential(nn.Linear(4, 4))
    theirs = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"]))
    theirs.save_pretrained(str(tmp_path / "files"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **asked: str(tmp_path / "files"))
    monkeypatch.chdir(tmp_path)
    assert st.load(nn.Sequential(nn.Linear(4, 4)), "user/qwen3-embedding_0.6B_lora").name == "default"
    with pytest.raises(st.InvalidName):
        st.load(nn.Sequential(nn.Linear(4, 4)), "user/qwen3-embedding_0.6B_lora", name="qwen3-embedding_0.6B_lora")


def test_all_linear_is_a_word_and_not_seven_letters() -> None:
    """huggingface/peft#3229: `set("all-linear")`."""
    spec = st.LoRA(targets="all-linear")
    assert spec.targets == "all-linear"
    config = peft.LoraConfig(target_modules="all-linear")
    model = zoo.llama()
    st.attach(model, config)
    assert st.adapters(model)["default"].spec.targets == "all-linear"
