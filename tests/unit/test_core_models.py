"""Attached models stay what they were: state dicts, saving, loading, wrappers, checkpointing, and plain training scripts."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import PlanError
from slimtune.core.host import Hosted
from slimtune.testing import zoo as tiny

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def busy(model: nn.Module, name: str = "default") -> nn.Module:
    torch.manual_seed(3)
    for p in model.slim_state.adapters[name].parameters():
        nn.init.normal_(p, std=0.2)
    return model


def adapted(model: nn.Module, spec: st.Spec | None = None, name: str = "default") -> nn.Module:
    st.attach(model, spec or st.LoRA(r=2), name=name)
    return busy(model, name)


# ---- the base stays clean -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_save_pretrained_writes_a_clean_base(kind: str, tmp_path: Path) -> None:
    plain, model = getattr(tiny, kind)(), adapted(getattr(tiny, kind)())
    want = plain.state_dict()
    got = base_state_dict(model)
    assert list(got) == list(want)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="without its adapter default"):
        model.save_pretrained(tmp_path / "adapted")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "adapted" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    again = type(plain).from_pretrained(tmp_path / "adapted")
    assert not [k for k in again.state_dict() if "slim" in k]
    for key, t in again.state_dict().items():
        assert torch.equal(t, want[key]), key


@pytest.mark.parametrize("how", ["its body", "a state dict", "a state dict by position", "diffusers"])
def test_whatever_saves_a_base_saves_it_clean(how: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    if how == "diffusers":
        from diffusers import UNet2DModel

        blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4}
        model: Any = UNet2DModel(**sizes, **blocks)
    else:
        model = tiny.llama()
    wanted = set((model.model if how == "its body" else model).state_dict())
    adapted(model, st.LoRA(r=2, targets=("to_q", "to_v")) if how == "diffusers" else None)
    given = model.state_dict()
    named = {"state_dict": given} if how == "a state dict" else {}
    save = (model.model if how == "its body" else model).save_pretrained
    positional = (tmp_path, True, given) if how == "a state dict by position" else (tmp_path,)
    with pytest.warns(UserWarning, match=r"writes the base without its adapter default: st\.save"):
        save(*positional, **named)
    file = next(tmp_path.glob("*.safetensors"))
    assert set(load_file(file)) == wanted
    st.detach(model, "default")
    assert type(model).save_pretrained.__qualname__ != "SavesBase.save_pretrained"


def test_a_merged_base_is_saved_merged(tmp_path: Path) -> None:
    model = adapted(tiny.llama())
    out = model(IDS).logits
    st.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the adapter is in there
        model.save_pretrained(tmp_path)
    again = type(tiny.llama()).from_pretrained(tmp_path)
    assert torch.allclose(again(IDS).logits, out, atol=1e-5)


def test_load_state_dict_into_an_adapted_base() -> None:
    plain, model = tiny.llama(), adapted(tiny.llama())
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    adapter = [p.clone() for p in model.slim_state.adapters["default"].parameters()]
    with pytest.raises(RuntimeError, match=r"Missing key.*slim\.default"):
        model.load_state_dict(plain.state_dict())
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys
    assert all(".slim.default." in key for key in result.missing_keys)
    assert not result.unexpected_keys
    with st.disabled(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    for a, b in zip(adapter, model.slim_state.adapters["default"].parameters(), strict=True):
        assert torch.equal(a, b), "the adapter is not the base's business"
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if "k_proj" not in k})


def test_tied_weights_stay_tied() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config).eval()
    adapted(model, st.LoRA(r=2, targets=("embed_tokens",)))
    out = model(IDS).logits
    assert model.lm_head.weight is model.model.embed_tokens.weight
    st.merge(model)
    assert torch.allclose(model(IDS).logits, out, atol=1e-5), "merging into the embedding must leave the head alone"
    st.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_moving_and_casting() -> None:
    model = adapted(tiny.llama())
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(IDS).logits).all()
    model.float()
    assert model(IDS).logits.dtype == torch.float32


def test_modes_reach_ops() -> None:
    model = adapted(tiny.llama(), st.LoRA(r=2, dropout=0.5))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits), "dropout acts in training"


def test_train_modules() -> None:
    model = tiny.bert()
    report = st.attach(model, st.LoRA(r=2, train_modules="head"))
    assert any(row.path == "classifier" for row in report.rows)
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    op = model.slim_state.adapters["default"].ops[("classifier", "weight")]
    assert op.D.grad.abs().max() > 0


def test_param_groups() -> None:
    model = adapted(tiny.bert(), st.LoRA(r=2, up_bias=True, train_modules="head"))
    groups = st.param_groups(model, lr=1e-3, up_ratio=16, weight_decay=0.1)
    of = {id(p): g for g in groups for p in g["params"]}
    for op in model.slim_state.adapters["default"].ops.values():
        if hasattr(op, "B"):
            assert of[id(op.B)]["lr"] == pytest.approx(1.6e-2)
            assert of[id(op.A)]["lr"] == 1e-3
            assert of[id(op.A)]["weight_decay"] == of[id(op.B)]["weight_decay"] == 0.1
            assert of[id(op.up_bias)]["weight_decay"] == 0
        else:
            assert of[id(op.D)] == {**of[id(op.D)], "lr": 1e-3, "weight_decay": 0.1}
            assert of[id(op.d)]["weight_decay"] == 0
    torch.optim.AdamW(groups).step()


# ---- wrappers -----------------------------------------------------------------------------------------------------------
def test_data_parallel_wrapper(tmp_path: Path) -> None:
    model = tiny.llama()
    st.attach(model, st.LoRA(r=2))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        assert st.report(wrapped).trainable > 0
        assert st.param_groups(wrapped, lr=1e-3)
        busy(model)
        out = wrapped(input_ids=IDS).logits
        with st.disabled(wrapped):
            assert not torch.equal(wrapped(input_ids=IDS).logits, out)
        st.merge(wrapped)
        assert torch.allclose(wrapped(input_ids=IDS).logits, out, atol=1e-5)
        st.unmerge(wrapped)
        st.detach(wrapped, "default")
        assert not any(isinstance(m, Hosted) for m in model.modules())
    finally:
        torch.distributed.destroy_process_group()


def test_torch_encoder_fast_path() -> None:
    """In eval mode without gradients torch fuses the whole layer and would never call the layers that carry ops."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        base = model(x)
        adapted(model, st.LoRA(r=2, targets=("linear1", "linear2")))
        out = model(x)
        assert not torch.allclose(out, base)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
        masked = model(x, src_key_padding_mask=padding)
        assert torch.isfinite(masked[~padding]).all()
        assert torch.allclose(masked[0], out[0], atol=1e-5)
    assert torch.allclose(model(x), out, atol=1e-5), "with gradients torch takes the slow path; both must agree"
    st.merge(model)
    with torch.no_grad():
        assert torch.allclose(model(x), out, atol=1e-5)
    st.unmerge(model)
    st.detach(model, "default")
    with torch.no_grad():
        assert torch.allclose(model(x), base, atol=1e-6)


# ---- copies -------------------------------------------------------------------------------------------------------------
def test_torch_save_of_a_whole_model(tmp_path: Path) -> None:
    model = adapted(tiny.llama())
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert isinstance(again, type(tiny.llama()))


def test_copies_of_parts_and_classes() -> None:
    model = adapted(tiny.llama())
    layer = copy.deepcopy(model.model.layers[0].mlp.down_proj)
    assert isinstance(layer, nn.Linear)
    assert pickle.loads(pickle.dumps(layer)).weight.shape == layer.weight.shape


# ---- checkpointing without help -------------------------------------------------------------------------------------------
def test_plain_checkpointing_outside_its_block_is_an_error() -> None:
    """Recomputing without the plan of the first run would give wrong gradients silently."""
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    st.attach(model, st.LoRA(r=2), name="a")
    busy(model, "a")
    st.use(model, None)
    st.trainable(model, "a")
    x = torch.randn(3, 8, requires_grad=True)
    with st.use(model, "a"):
        out = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(PlanError, match="recomputed outside"):
        out.sum().backward()
    with st.use(model, "a"):
        checkpoint(model, x, use_reentrant=False).sum().backward()


# ---- plain training scripts ---------------------------------------------------------------------------------------------
class Words(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 11) + i
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(tmp_path: Path, checkpointing: bool) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny.llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.LoRA(r=2))
    start = [p.detach().clone() for p in model.slim_state.adapters["default"].parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=checkpointing, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Words())
    result = trainer.train()
    assert result.global_step == 2
    moved = [not torch.equal(a, b) for a, b in zip(start, model.slim_state.adapters["default"].parameters(), strict=True)]
    assert any(moved)
    for key, t in base_state_dict(model).items():
        assert torch.equal(t, before[key]), f"{key} of the base changed"


def test_trl_sft_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from small import tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    words = tokenizer()
    words.pad_token = words.eos_token
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(words))
    )
    st.attach(model, st.LoRA(r=2))
    start = [p.detach().clone() for p in model.slim_state.adapters["default"].parameters()]
    data = Dataset.from_list([{"text": "Review: the tea was great\nAnswer: great"}] * 4)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, max_length=32, learning_rate=1e-2,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=words)
    assert trainer.train().global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(start, model.slim_state.adapters["default"].parameters(), strict=True))
