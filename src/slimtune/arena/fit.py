"""One run of the arena: a fresh copy of the model, one contender, the same Trainer, the same rows, a score."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimtune as st
from slimtune.arena.contenders import FIXED, REFERENCE, Contender, spec_of
from slimtune.arena.tasks import Task, phoneme_accuracy
from slimtune.core.targets import heads
from slimtune.train.job import Job
from slimtune.train.runs import folder_bytes

PLAIN = Path(__file__).resolve().parents[1] / "assets" / "plain_english.txt"


@dataclass
class Setup:
    """A contender on a fresh copy of the model, ready to train.

    Attributes:
        model: what the Trainer gets.
        trainable: how many parameters train.
        save: writes what was learnt into a folder.
        each_step: called before the gradients are cleared, with the number of the step (the reference's AdaLoRA needs it).
        mixed: float32 weights under bfloat16 autocast, as people fine-tune all weights of a model that is stored in bfloat16.
    """

    model: Any
    trainable: int
    save: Callable[[Path], object]
    each_step: Callable[[int], object] | None = None
    mixed: bool = False


def set_up(job: Job, task: Task, who: Contender, seed: int, steps: int) -> Setup:
    """Put a contender onto a fresh copy of the task's model.

    Raises:
        SlimtuneError: the method has no place in this model.
    """
    from transformers import set_seed

    set_seed(seed)
    model = copy.deepcopy(job.model)
    if job.task == "classification":
        _new_head(model)
    each_step, mixed = None, False
    if who.library == "peft":
        from peft import TaskType, get_peft_model

        config = REFERENCE[who.name](spec_of(who.name, task, steps), steps, model)
        config.task_type = TaskType.SEQ_CLS if job.task == "classification" else TaskType.CAUSAL_LM
        head = _head(model) if job.task == "classification" else None
        model = get_peft_model(model, config)
        if who.name == "adalora":
            each_step = model.base_model.update_and_allocate
            for name, p in model.named_parameters():
                if "ranknum" in name:  # peft 0.21.2 leaves this constant trainable, and AdamW would move it
                    p.requires_grad_(False)
        if who.name == "multitask_prompt_tuning":  # it asks for the tasks of the rows with every call: there is one task here
            model.register_forward_pre_hook(_first_task, with_kwargs=True)
        if who.name == "trainable_tokens" and head is not None:  # it leaves a new head as it is drawn, unlike its other methods
            head.requires_grad_(True)
        save: Callable[[Path], object] = model.save_pretrained
    elif who.name == "full":
        mixed = model.dtype != torch.float32
        model.requires_grad_(True)
        model.float()
        save = model.save_pretrained
    else:
        spec = spec_of(who.name, task, steps)
        st.attach(model, spec)
        st.lean(model)
        save = lambda folder: st.save(model, folder)  # noqa: E731
    return Setup(model, sum(p.numel() for p in set(model.parameters()) if p.requires_grad), save, each_step, mixed)


def _first_task(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows = len(kwargs["input_ids"])
    return args, {**kwargs, "task_ids": torch.zeros(rows, dtype=torch.long, device=kwargs["input_ids"].device)}


def _head(model: nn.Module) -> nn.Linear:
    """Return the linear layer that gives a classifier's logits."""
    return next(m for m in map(model.get_submodule, heads(model)) if isinstance(m, nn.Linear))


def _new_head(model: nn.Module) -> None:
    """Draw the classifier's head anew, so that seeds differ in it."""
    head = _head(model)
    nn.init.normal_(head.weight, std=float(model.config.initializer_range))  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(head.bias)


def fit(job: Job, task: Task, who: Contender, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once for `steps` optimiser steps and return the figures: `valid` chooses the learning rate, `score` is of the test rows."""
    if who.name in FIXED:
        return baseline(job, who, steps * task.batch)
    setup = set_up(job, task, who, seed, steps)
    train(job, task, setup, lr, seed, steps)
    mine = replace(job, model=setup.model)
    found: dict[str, Any] = {"trainable": setup.trainable, "valid": selection(mine, task), "score": score(mine, task), "bytes": _bytes(setup)}
    if task.plain:
        found["forgetting"] = plain_loss(mine) - plain_loss(job)
    return found


def score(job: Job, task: Task) -> float:
    """Return the score on the test rows; higher is better."""
    if task.score == "phonemes":
        return phoneme_accuracy(job, job.held_out())
    accuracy = job.evaluate(job.held_out()).accuracy
    assert accuracy is not None
    return accuracy


def selection(job: Job, task: Task) -> float:
    """Return what a learning rate is chosen by, on the validation rows; higher is better."""
    found = job.evaluate(job.valid_rows)
    if task.score == "phonemes" or found.accuracy is None:
        return -found.loss
    return found.accuracy - 1e-3 * found.loss  # equal accuracies are told apart by their loss


def train(job: Job, task: Task, setup: Setup, lr: float, seed: int, steps: int) -> None:
    """Train with transformers' Trainer: AdamW, linear schedule, the same order of rows for everybody with the same seed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class EachStep(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if setup.each_step is not None:
                setup.each_step(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=task.batch,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 16),
            seed=seed,
            data_seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=setup.mixed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(setup.model, args, train_dataset=job.train_rows, data_collator=job.collate, callbacks=[EachStep()])
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()


def plain_loss(job: Job) -> float:
    """Return the mean loss per token on plain English that has nothing to do with any task."""
    from slimtune.train.evaluate import evaluate_causal

    ids = job.tokenizer(PLAIN.read_text(encoding="utf-8"))["input_ids"]
    rows = [{"input_ids": ids[i : i + 128], "labels": ids[i : i + 128]} for i in range(0, len(ids) - 1, 128)]
    return evaluate_causal(job.model, rows, job.tokenizer.pad_token_id, batch_rows=8).loss


def _bytes(setup: Setup) -> int:
    """Return what the learnt part takes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        setup.save(Path(folder) / "saved")
        return folder_bytes(Path(folder) / "saved")


def baseline(job: Job, who: Contender, seen: int) -> dict[str, Any]:
    """Return the score of something that is not trained by gradient: on the words, or on the frozen model's features.

    Args:
        seen: how many training rows it gets: as many as a run of the others sees, at most all.
    """
    from slimtune.train.baselines import majority, tfidf

    raw = job.bundle.raw
    train, test = ([(str(r["text"]), str(r["label"])) for r in raw[k]] for k in ("train", "test"))
    train, test = train[:seen], test[: len(job.held_out())]
    if who.name == "probe":
        value = probe(job, train, test, job.held_out())
    elif who.name == "majority":
        value = majority([y for _, y in train], [y for _, y in test])
    else:
        value = tfidf(train, test)
    return {"valid": 0.0, "score": value, "trainable": 0, "bytes": 0}  # nothing to choose


def probe(job: Job, train_words: list[tuple[str, str]], test_words: list[tuple[str, str]], test_rows: Sequence[Any]) -> float:
    """Return the accuracy of a logistic regression, trained to its optimum, on what the frozen model gives a head: a head alone.

    That is the input of a classifier's head, and the last hidden state at the end of the prompt of a causal model.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(rows: Sequence[Any]) -> Any:
        from slimtune.train.collate import Collator
        from slimtune.train.evaluate import measuring

        out: list[torch.Tensor] = []
        head = _head(job.model) if job.task == "classification" else None
        watch = head.register_forward_pre_hook(lambda module, args: out.append(args[0].float())) if head is not None else nullcontext()
        with measuring(job.model), torch.inference_mode(), watch:
            for i in range(0, len(rows), 16):
                if head is not None:
                    job.model(**job.collate(rows[i : i + 16]))
                    continue
                batch = Collator(job.tokenizer.pad_token_id, left=True)([{"input_ids": job.prompt_of(r)} for r in rows[i : i + 16]])
                out.append(job.model(**batch, output_hidden_states=True).hidden_states[-1][:, -1].float())
        return torch.cat(out).numpy()

    rows = job.train_rows.to_list()[: len(train_words)]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=2000))
    model.fit(features(rows), [y for _, y in train_words])
    return float(model.score(features(test_rows), [y for _, y in test_words]))
