"""metrics.jsonl, progress lines, and adapters saved by a plain Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

import slimtune as st
from slimtune.train.callbacks import AdapterCallback, MetricsCallback, MetricsFile, ProgressCallback
from slimtune.train.collate import LengthGroupedSampler
from slimtune.train.report import read_metrics


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(config)


DATA = [{"input_ids": [i % 40, 3, 4, 5], "labels": [-100, 3, 4, 5]} for i in range(8)]


def state(step: int = 3, most: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=most, is_world_process_zero=True)


def test_metrics_have_short_names(tmp_path: Path) -> None:
    callback = MetricsCallback(MetricsFile(tmp_path / "metrics.jsonl"))
    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    logs = {
        "loss": 1.5,
        "grad_norm": 0.2,
        "learning_rate": 1e-3,
        "epoch": 0.33333333,
        "tokens": 90,
        "seconds": 1.2,
        "tokens_per_second": 75.0,
    }
    callback.on_log(args, state(), control, logs)
    callback.on_log(args, state(), control, {"eval_loss": 0.7, "eval_accuracy": 0.5, "epoch": 1.0})
    callback.on_log(args, state(), control, {"train_runtime": 3.0, "epoch": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {
            "step": 3,
            "epoch": 0.3333,
            "loss": 1.5,
            "lr": 1e-3,
            "grad_norm": 0.2,
            "tokens": 90,
            "seconds": 1.2,
            "tokens_per_second": 75.0,
        },
        {"step": 3, "eval_loss": 0.7, "eval_accuracy": 0.5},
    ]


def test_a_resumed_file_has_no_step_twice(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        file.write({"step": step, "loss": 1.0})
    with file.path.open("a") as f:
        f.write('{"step": 8, "lo')
    again = MetricsFile(tmp_path / "metrics.jsonl", keep_to=5)
    again.write({"step": 6, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(file.path)] == [(s, 1.0) for s in range(1, 6)] + [(6, 2.0)]


def test_progress_in_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressCallback(seconds_between_lines=0.0)
    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    progress.on_train_begin(args, state(0), control)
    progress.on_log(args, state(4), control, {"loss": 1.25, "tokens_per_second": 1234.0})
    progress.on_log(args, state(10), control, {"loss": 0.5, "tokens_per_second": 1000.0})
    progress.on_log(args, state(10), control, {"train_loss": 0.5})
    progress.on_train_end(args, state(10), control)
    first, last = capsys.readouterr().err.splitlines()
    assert "step 4/10" in first
    assert "loss 1.2500" in first
    assert "1,234 tokens/s" in first
    assert "left" in first
    assert "step 10/10" in last


def test_plain_trainer_saves_adapters(tmp_path: Path) -> None:
    model = tiny()
    st.attach(model, st.LoRA(r=2), name="mine")
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-2,
        use_cpu=True,
    )
    Trainer(model=model, args=args, train_dataset=DATA, callbacks=[AdapterCallback("mine")]).train()
    for folder in ("checkpoint-2/adapter", "checkpoint-4/adapter", "adapter"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint-4/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    inputs = torch.tensor([[1, 2, 3]])
    wanted = model(input_ids=inputs).logits
    fresh = tiny()
    st.load(fresh, tmp_path / "adapter", name="mine")
    torch.testing.assert_close(fresh(input_ids=inputs).logits, wanted)


def test_plain_trainer_over_a_quantised_base(tmp_path: Path) -> None:
    """Its checkpoints hold the adapter, and without one it refuses as ever."""
    from transformers import BitsAndBytesConfig

    tiny().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "none"), use_cpu=True), train_dataset=DATA)
    st.attach(model, st.LoRA(r=2), name="mine")
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-2,
        use_cpu=True,
        logging_steps=1,
        save_steps=3,
    )
    trainer = Trainer(model=model, args=args, train_dataset=DATA)
    assert "_hf_peft_config_loaded" not in model.__dict__
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)
    inputs = torch.tensor([[1, 2, 3]])
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map={"": "cpu"})
    st.load(fresh, tmp_path / "out" / "checkpoint-3", name="mine")
    torch.testing.assert_close(fresh(input_ids=inputs).logits, model.eval()(input_ids=inputs).logits)


def test_order_of_rows_does_not_depend_on_how_a_step_is_split() -> None:
    lengths = [5 + (7 * i) % 23 for i in range(50)]
    whole = LengthGroupedSampler(lengths, 8, seed=3)
    assert sorted(whole) == list(range(50))
    again = LengthGroupedSampler(lengths, 8, seed=3)
    assert list(whole) == list(again)
    again.set_epoch(1)
    assert list(whole) != list(again)
