"""Checkpoints of transformers' Trainer, TRL's and sentence-transformers': the adapter and no base, resumed to the bit, the best one brought back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import slimtune as st
from slimtune.core.errors import CapabilityError, FileError, SpecError
from slimtune.integrations.trainer import KeepsAdapters
from slimtune.integrations.watch import _OnImport
from slimtune.train.trainer import SlimTrainer

IDS = torch.tensor([[1, 2, 3, 4, 5]])
GENERATOR = torch.Generator().manual_seed(5)
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 40, (16, 6), generator=GENERATOR)]
HELD_OUT = [{"input_ids": row, "labels": row} for row in torch.randint(3, 40, (8, 6), generator=GENERATOR)]
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")


def tiny(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **more
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=2, learning_rate=5e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=2, seed=0, lr_scheduler_type="cosine",
    )  # fmt: skip
    return TrainingArguments(**options | more)


class Killed(Exception):
    """Training was cut off."""


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapters, frozen ones and what methods keep included."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if ".slim." in k}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(folder: Path, spec: st.Spec, resume: Any = None, kill: int | None = None, **more: Any) -> tuple[nn.Module, Trainer]:
    model = tiny()
    st.attach(model, spec)
    callbacks = [Kill(kill)] if kill is not None else []
    trainer = Trainer(model=model, args=arguments(folder, **more), train_dataset=ROWS, eval_dataset=HELD_OUT, callbacks=callbacks)
    if kill is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=resume)
    return model, trainer


SPECS = {
    "lora with dropout": st.LoRA(r=2, dropout=0.3),
    "head": st.LoRA(r=2, train_modules=("lm_head",)),
    "dora": st.DoRA(),
    "vera": st.VeRA(r=4),
    "prompt": st.PromptTuning(tokens=3),
    "prefix": st.PrefixTuning(p=3, hidden=4),  # trained through a network that its file does not hold
    "adalora": st.AdaLoRA(init_r=4, target_r=2, t_init=1, t_final=1, delta_t=1),
    "progressive": st.ProgressiveLoRA(every=2),
    "delta": st.DeltaLoRA(r=2, start=1),
}


@pytest.mark.parametrize("name", list(SPECS))
def test_a_killed_run_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    whole, _ = trained(tmp_path / "whole", spec)
    trained(tmp_path / "cut", spec, kill=5)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    again, trainer = trained(tmp_path / "cut", spec, resume=True)
    assert trainer.state.global_step == 6
    assert equal(tensors(whole), tensors(again))
    assert whole.slim_state.adapters["default"].steps == again.slim_state.adapters["default"].steps
    start = tiny()
    st.attach(start, spec)
    assert not equal(tensors(whole), tensors(start)), "nothing was trained"


def test_a_checkpoint_holds_the_adapter_and_no_base(tmp_path: Path) -> None:
    model, _ = trained(tmp_path, st.LoRA(r=2))
    checkpoint = tmp_path / "checkpoint-6"
    assert not [name for name in WEIGHTS if (checkpoint / name).exists()]
    stored = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.slim_state.adapters["default"].parameters())
    fresh = tiny().eval()
    st.load(fresh, checkpoint)
    torch.testing.assert_close(fresh(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert (checkpoint / "training_args.bin").is_file()


@pytest.mark.parametrize("name", ["lora with dropout", "adalora", "prefix"])
def test_the_best_one_is_brought_back(name: str, tmp_path: Path) -> None:
    """The loss on what is trained on falls, and the highest is called the best: not the last checkpoint."""
    model = tiny()
    st.attach(model, SPECS[name], name="mine")
    args = arguments(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, eval_strategy="steps", eval_steps=2
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "else nothing would be shown"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert model.slim_state.adapters["mine"].steps == (trainer.state.best_global_step if name == "adalora" else 0)
    fresh = tiny().eval()
    st.load(fresh, best)
    torch.testing.assert_close(fresh(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_save_model_writes_the_adapter_alone(tmp_path: Path) -> None:
    model, trainer = trained(tmp_path / "run", st.LoRA(r=2), save_strategy="no")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say: all that was trained is there
        trainer.save_model(str(tmp_path / "final"))
    names = {p.name for p in (tmp_path / "final").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"}
    fresh = tiny().eval()
    st.load(fresh, tmp_path / "final")
    torch.testing.assert_close(fresh(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_the_limit_of_checkpoints_holds(tmp_path: Path) -> None:
    trained(tmp_path, st.LoRA(r=2), save_total_limit=1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def two(folder: Path, resume: Any = None, kill: int | None = None) -> nn.Module:
    model = tiny()
    st.attach(model, st.LoRA(r=2), name="a")
    st.attach(model, st.IA3(), name="b")
    st.attach(model, st.LoRA(r=1), name="idle")
    st.use(model, ["a", "b"])
    trainer = Trainer(model=model, args=arguments(folder), train_dataset=ROWS, callbacks=[Kill(kill)] if kill else [])
    if kill:
        with pytest.raises(Killed):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume)
    return model


def test_several_adapters_get_a_folder_each(tmp_path: Path) -> None:
    whole = two(tmp_path / "whole")
    two(tmp_path / "cut", kill=4)
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    assert sorted(p.parent.name for p in checkpoint.rglob("adapter_model.safetensors")) == ["a", "b"], "each that trains"
    again = two(tmp_path / "cut", resume=True)
    assert equal(tensors(whole), tensors(again))
    fresh = tiny().eval()
    for name in ("a", "b"):
        st.load(fresh, tmp_path / "whole" / "checkpoint-6" / name)
    st.use(fresh, ["a", "b"])
    torch.testing.assert_close(fresh(input_ids=IDS).logits, whole.eval()(input_ids=IDS).logits)


# ---- other trainers -----------------------------------------------------------------------------------------------------
def test_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def run(folder: Path, resume: Any = None, kill: int | None = None) -> nn.Module:
        model = tiny()
        model.warnings_issued = {}
        st.attach(model, st.LoRA(r=2, dropout=0.2))
        args = SFTConfig(
            output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
            learning_rate=5e-2, max_length=8, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=[Kill(kill)] if kill is not None else []
        )
        if kill is not None:
            with pytest.raises(Killed):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", kill=3)
    again = run(tmp_path / "cut", resume=True)
    assert equal(tensors(whole), tensors(again))
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    assert not [name for name in WEIGHTS if (checkpoint / name).exists()]
    assert (checkpoint / "tokenizer_config.json").is_file()
    st.load(tiny(), checkpoint)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[EOS]", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=16)


def embedder(folder: Path) -> Any:
    """A sentence-transformers model over a tiny BERT."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    if not folder.exists():
        config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
        BertModel(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    body = Transformer(str(folder))
    torch.manual_seed(1)
    return SentenceTransformer(modules=[body, Pooling(16)], device="cpu")


@pytest.mark.parametrize("part", ["the whole model", "its body"])
def test_sentence_transformers(part: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CosineSimilarityLoss

    pairs = Dataset.from_list([{"sentence1": f"{chr(97 + i)} b c", "sentence2": f"d e {chr(110 - i)}", "score": i / 16} for i in range(16)])

    def run(folder: Path, resume: Any = None, kill: int | None = None, best: bool = False) -> tuple[Any, Any]:
        model = embedder(tmp_path / "base")
        st.attach(model if part == "the whole model" else model[0].auto_model, st.LoRA(r=2, targets=("query", "value")))
        more: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 2}
        args = SentenceTransformerTrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
            learning_rate=0.5 if best else 5e-2, **(more if best else {}),
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs, eval_dataset=pairs if best else None, loss=CosineSimilarityLoss(model),
            callbacks=[Kill(kill)] if kill is not None else [],
        )  # fmt: skip
        if kill is not None:
            with pytest.raises(Killed):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", kill=5)
    again, _ = run(tmp_path / "cut", resume=True)
    assert equal(tensors(whole), tensors(again))
    assert not list((tmp_path / "cut").rglob("model.safetensors"))
    model, trainer = run(tmp_path / "best", best=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    fresh = embedder(tmp_path / "base")
    st.load(fresh if part == "the whole model" else fresh[0].auto_model, tmp_path / "final")
    assert abs(fresh.encode(["a b c"]) - model.encode(["a b c"])).max() < 1e-5


def test_a_cross_encoder_with_a_new_head(tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    pairs = Dataset.from_list([{"a": f"{chr(97 + i)} b c", "b": f"d e {chr(110 - i)}", "score": i / 16} for i in range(16)])
    embedder(tmp_path / "base")

    def model() -> Any:
        torch.manual_seed(0)  # the head is not in the checkpoint: random
        made = CrossEncoder(str(tmp_path / "base"), num_labels=1, device="cpu")
        return made

    made = model()
    st.attach(made, st.LoRA(r=2, targets=("query", "value"), train_modules=("classifier",)))
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=5e-2,
    )  # fmt: skip
    CrossEncoderTrainer(model=made, args=args, train_dataset=pairs).train()
    fresh = model()
    before = fresh.predict([("a b c", "d e f")])
    st.load(fresh, tmp_path / "run" / "checkpoint-4")
    assert abs(fresh.predict([("a b c", "d e f")]) - made.predict([("a b c", "d e f")])).max() < 1e-6
    assert abs(fresh.predict([("a b c", "d e f")]) - before).max() > 1e-4


# ---- what a Trainer does besides ----------------------------------------------------------------------------------------
class Hub:
    """Stands for the hub: keeps what is uploaded."""

    def __init__(self) -> None:
        self.uploaded: list[set[str]] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, folder_path: str, run_as_future: bool = False, **kwargs: Any) -> Any:
        self.uploaded.append({p.name for p in Path(folder_path).iterdir() if p.is_file()})
        done = type("Job", (), {"done": lambda self: True, "result": lambda self: None, "exception": lambda self: None})
        return done() if run_as_future else "https://hub/me/x"


def test_a_push_holds_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer as module

    hub = Hub()
    if hasattr(module, "hf_api"):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    else:  # older versions
        monkeypatch.setattr(module, "create_repo", hub.create_repo)
        monkeypatch.setattr(module, "upload_folder", hub.upload_folder)
    model = tiny()
    st.attach(model, st.LoRA(r=2))
    args = arguments(tmp_path / "x", max_steps=2, push_to_hub=True, hub_model_id="me/x", hub_token="hf_x")
    trainer = Trainer(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
    assert len(hub.uploaded) >= 2, "while it trained, and at the end"
    for names in hub.uploaded:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
    assert "README.md" in hub.uploaded[-1]


def test_a_plain_module(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.down(self.up(x).tanh()) - y).square().mean()}

    rows = [{"x": torch.randn(6, generator=GENERATOR), "y": torch.ones(1)} for _ in range(16)]

    def run(folder: Path, kill: int | None = None, resume: Any = None) -> nn.Module:
        net = Net()
        st.attach(net, st.LoRA(r=2))
        trainer = Trainer(model=net, args=arguments(folder, lr_scheduler_type="linear"), train_dataset=rows, callbacks=[Kill(kill)] if kill else [])
        if kill:
            with pytest.raises(Killed):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return net

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", kill=3)
    assert not list(tmp_path.rglob("model.safetensors"))
    assert equal(tensors(whole), tensors(run(tmp_path / "cut", resume=True)))


def test_a_compiled_model(tmp_path: Path) -> None:
    def compiled(steps: int) -> tuple[nn.Module, Trainer]:
        model = tiny()
        st.attach(model, st.LoRA(r=2, targets=("q_proj",), layers="0"))
        wrapped: Any = torch.compile(model, backend="eager")
        args = arguments(tmp_path, remove_unused_columns=False, max_steps=steps, save_steps=1, lr_scheduler_type="constant")
        return model, Trainer(model=wrapped, args=args, train_dataset=ROWS)

    first, trainer = compiled(steps=1)
    trainer.train()
    names = safetensors.torch.load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors").keys()
    assert len(names) == 2
    assert not [name for name in names if "_orig_mod" in name]
    again, trainer = compiled(steps=1)
    assert not equal(tensors(first), tensors(again))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert equal(tensors(first), tensors(again))


def test_a_model_made_by_the_trainer(tmp_path: Path) -> None:
    """model_init: a fresh model for each run, as for a search of hyper-parameters."""

    def fresh() -> nn.Module:
        model = tiny()
        st.attach(model, st.LoRA(r=2))
        return model

    trainer = Trainer(model_init=fresh, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    for _ in range(2):
        trainer.train()
        stored = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "state.safetensors")
        live = trainer.model.slim_state.adapters["default"].ops
        assert all(torch.equal(stored[f"{path}|{key}|B"], op.B) for (path, key), op in live.items())


def test_adapters_that_come_after_the_trainer(tmp_path: Path) -> None:
    model = tiny()
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    st.attach(model, st.LoRA(r=2))
    trainer.save_model(str(tmp_path / "before"))
    trainer.train()
    for folder in ("before", "checkpoint-2"):
        st.load(tiny(), tmp_path / folder)


def test_the_trainers_module_may_be_imported_later() -> None:
    """The import is watched for once, and the module is as it would be without."""
    import sys

    name = "wave"  # of the standard library, and of no one's interest here
    sys.modules.pop(name, None)
    told: list[Any] = []
    sys.meta_path.insert(0, _OnImport(name, told.append))
    import wave

    assert told == [wave]
    assert callable(wave.open)
    assert not any(isinstance(finder, _OnImport) and finder.name == name for finder in sys.meta_path)


def test_others_are_left_alone(tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for trainer, file in (
        (Trainer(model=tiny(), args=arguments(tmp_path / "full", max_steps=2), train_dataset=ROWS), "model.safetensors"),
        (Trainer(model=model, args=arguments(tmp_path / "peft", max_steps=2), train_dataset=ROWS), "adapter_model.safetensors"),
    ):
        assert not isinstance(trainer, KeepsAdapters)
        trainer.train()
        assert list(Path(trainer.args.output_dir).glob(f"*/{file}"))
    model = tiny()
    st.attach(model, st.LoRA(r=2))
    trainer = Trainer(model=model, args=arguments(tmp_path / "gone"), train_dataset=ROWS)
    assert isinstance(trainer, KeepsAdapters)
    assert type(trainer).__name__ == "Trainer"
    st.detach(model, "default")
    trainer.save_model(str(tmp_path / "base"))
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert not isinstance(SlimTrainer, KeepsAdapters)


def test_a_base_that_trains_beside_an_adapter_at_rest_is_saved_as_ever(tmp_path: Path) -> None:
    model = tiny()
    st.attach(model, st.LoRA(r=2))
    st.use(model, None)
    for name, p in model.named_parameters():
        p.requires_grad_(".slim." not in name)
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    with pytest.warns(UserWarning, match="without its adapter default"):
        trainer.train()
    names = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys()
    assert not [name for name in names if "slim" in name]


def test_a_trainer_with_ways_of_its_own_writes_the_adapter_too(tmp_path: Path) -> None:
    class Own(Trainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            (Path(str(output_dir)) / "mine.txt").write_text("mine")

    model = tiny()
    st.attach(model, st.LoRA(r=2))
    trainer = Own(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "mine.txt").is_file()
    st.load(tiny(), tmp_path / "checkpoint-2")


# ---- refusals -----------------------------------------------------------------------------------------------------------
def test_an_unknown_trainer_is_refused(tmp_path: Path) -> None:
    class Other(Trainer):
        def _save(self, where: str) -> None:  # type: ignore[override]
            raise NotImplementedError

    model = tiny()
    st.attach(model, st.LoRA(r=2))
    with pytest.raises(CapabilityError, match=r"_save[\s\S]*st\.save"):
        Other(model=model, args=arguments(tmp_path), train_dataset=ROWS)
    trainer = Other(model=model, args=arguments(tmp_path, save_strategy="no", max_steps=1), train_dataset=ROWS)  # what the hint says
    trainer.train()
    st.save(model, tmp_path / "mine")
    st.load(tiny(), tmp_path / "mine")
    with pytest.raises(CapabilityError, match="would lose the adapter"):
        trainer.save_model()


def test_a_sharded_adapter_is_refused(tmp_path: Path) -> None:
    """Before training, not with the first checkpoint; elsewhere such files were written empty."""
    model = tiny()
    st.attach(model, st.LoRA(r=2))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.is_fsdp_enabled = True  # what accelerate says of a launch with FSDP
    with pytest.raises(CapabilityError, match="shards the adapter"):
        trainer.train()


def test_parameters_outside_of_the_adapter_are_not_lost_in_silence(tmp_path: Path) -> None:
    model = tiny()
    st.attach(model, st.LoRA(r=2))
    model.lm_head.weight.requires_grad_(True)
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    with pytest.raises(SpecError, match=r"lm_head\.weight") as told:
        trainer.train()
    assert "train_modules=('lm_head',)" in told.value.hint
    model = tiny()
    st.attach(model, st.LoRA(r=2, train_modules=("lm_head",)))  # what the hint says
    Trainer(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=ROWS).train()


def test_a_checkpoint_without_the_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    """Such as those of slimtune 0.1.0, with the base in them and, by a callback, an adapter in a folder: the hint leads on."""
    model, _ = trained(tmp_path / "old", st.LoRA(r=2), max_steps=2)
    checkpoint = tmp_path / "old" / "checkpoint-2"
    for file in (*checkpoint.glob("adapter_*"), checkpoint / "state.safetensors"):
        file.unlink()
    tiny().save_pretrained(checkpoint)
    st.save(model, checkpoint / "adapter")
    fresh = tiny()
    st.attach(fresh, st.LoRA(r=2))
    again = Trainer(model=fresh, args=arguments(tmp_path / "new"), train_dataset=ROWS)
    with pytest.raises(FileError, match="does not hold") as told:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert repr(str(checkpoint / "adapter")) in told.value.hint
    other = tiny()
    st.load(other, checkpoint / "adapter", trainable=True)  # what the hint says
    Trainer(model=other, args=arguments(tmp_path / "new", max_steps=2), train_dataset=ROWS).train()


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, st.LoRA(r=2), max_steps=2)
    model = tiny()
    st.attach(model, st.LoRA(r=3))
    with pytest.raises(FileError, match="another model or method"):
        Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS).train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
