"""transformers' Trainer with slimtune's loss, checkpoints and order of rows.

A checkpoint is a folder `step-N` with the adapter (loadable by itself), the exact trained tensors, optimiser, scheduler, random
states and counters; never the base. It is written under a temporary name and renamed, so it is whole or absent. Everything a
step depends on is in it or is a function of (seed, epoch), which is why a resumed run ends with the same bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import slimtune as st
from slimtune.core.errors import RecipeError
from slimtune.core.finite import non_finite
from slimtune.train.checkpoint import PROGRESS, flush, intact, read_tensors, trained_tensors, write_tensors
from slimtune.train.collate import LengthGroupedSampler
from slimtune.train.evaluate import Evaluation
from slimtune.train.loss import causal_loss, classification_loss, has_own_loss
from slimtune.train.runs import RunFolder, read_json, write_json


class SlimTrainer(Trainer):
    """The Trainer of `slimtune train`.

    Args:
        model: with the adapter attached, or bare when every weight is trained.
        args: the Trainer's settings.
        adapter: the adapter's name; None trains every weight.
        folder: the run folder.
        rows: tokenised training rows with input_ids and labels.
        collate: rows to a batch of tensors.
        task: "causal_lm" or "classification".
        order: the order of the rows.
        lr, up_ratio, weight_decay: of the optimiser.
        keep: checkpoints to keep.
        measure: gives the figures on held-out rows; None without such rows.
        callbacks: as the Trainer's.
    """

    keeps_adapters = True  # its checkpoints hold the adapter in a way of their own (see `integrations.trainer`)
    loss_is_scaled_for_ga = True  # our losses are sums over the whole step's items already

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        adapter: str | None,
        folder: RunFolder,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        task: str,
        order: LengthGroupedSampler,
        lr: float,
        up_ratio: float,
        weight_decay: float,
        keep: int,
        measure: Callable[[], Evaluation] | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.adapter, self.folder, self.task, self.order = adapter, folder, task, order
        self.base_lr, self.up_ratio, self.decay, self.keep, self.measure = lr, up_ratio, weight_decay, keep, measure
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()
        self.logged = (0, 0.0)
        self.trained = model  # the Trainer's own `model` may be anything; this is the one with the adapter
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=[] if measure else None,
            data_collator=collate,
            callbacks=[_FollowEpochs(order, args, len(rows)), *([_StopAtNonFinite(self)] if adapter is not None else []), *callbacks],
        )
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the items of a step; the model itself never sees them
        self._loss_shifts_labels = task == "causal_lm"
        self.own_loss = task == "causal_lm" and has_own_loss(self.trained)

    # ---- data and optimiser ---------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.adapter is None:
                groups = _full_groups(self.trained, self.base_lr, self.decay)
            else:
                groups = st.param_groups(self.trained, lr=self.base_lr, up_ratio=self.up_ratio, weight_decay=self.decay)
            kinds = {p.device.type for g in groups for p in g["params"]}
            self.optimizer = torch.optim.AdamW(groups, lr=self.base_lr, fused=kinds <= {"cpu", "cuda"})
        return self.optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's estimate walks the whole model at every step; tokens per second say more

    # ---- one step -------------------------------------------------------------------------------------------------------
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.tokens += int(inputs["attention_mask"].sum())
        if self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.task == "causal_lm":
            loss = causal_loss(model, inputs, num_items_in_batch, unwrapped=self.trained)
        else:
            loss = classification_loss(model, inputs, num_items_in_batch, unwrapped=self.trained)
        # Data-parallel processes average their gradients, and each has divided by the items of all of them.
        return loss * self.accelerator.num_processes if num_items_in_batch is not None else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise self._failed(f"the loss became {float(loss)} at step {self.state.global_step + 1}")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._failed(f"the gradient became {float(norm)} at step {self.state.global_step + 1}")
        return norm

    def train(self, *args: Any, **kwargs: Any) -> Any:
        out = super().train(*args, **kwargs)
        self.check_finite()
        return out

    def check_finite(self) -> None:
        """Raise if what is trained holds NaN or infinity: such a run has failed, and nothing of it is written.

        Raises:
            RecipeError: naming the tensors and the last checkpoint, which is finite.
        """
        if bad := non_finite(trained_tensors(self.trained, self.adapter).items()):
            what = "the adapter" if self.adapter is not None else "the model"
            names = ", ".join(name.replace("|", ".") for name in bad[:4])
            raise self._failed(f"{what} holds NaN or infinity after step {self.state.global_step}, in {len(bad)} tensor(s): {names}")

    def _failed(self, what: str) -> RecipeError:
        kept = self.folder.latest_checkpoint()
        last = "" if kept is None else f"; the last finite checkpoint is kept: {kept}"
        hint = f"lower lr, lengthen warmup, or use dtype: float32; `slimtune inspect data RECIPE` shows the data{last}"
        return RecipeError(what, where=str(self.folder.path), hint=hint)

    def anyone(self, asked: bool) -> bool:
        """True on every process when it is true on one: they must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        return self._total(int(asked)) > 0

    def tokens_everywhere(self) -> int:
        """Tokens (without padding) that all processes have trained on."""
        return self._total(self.tokens)

    def _total(self, count: int) -> int:
        return int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).sum())

    # ---- figures --------------------------------------------------------------------------------------------------------
    def start_clock(self) -> None:
        """Count time from now on (again after a resume)."""
        self.since = time.perf_counter() - self.seconds
        self.logged = (self.tokens, self.seconds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.seconds = time.perf_counter() - self.since
            recent = self._total(self.tokens - self.logged[0])
            logs["tokens"] = self.tokens
            logs["seconds"] = round(self.seconds, 3)
            logs["tokens_per_second"] = round(recent / max(1e-9, self.seconds - self.logged[1]), 1)
            self.logged = (self.tokens, self.seconds)
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        if self.measure is None:
            return {}
        found = self.measure().figures()
        metrics = {f"{metric_key_prefix}_{k.replace(' ', '_')}": round(v, 6) for k, v in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        final = self.folder.checkpoint(self.state.global_step)
        if final.is_dir():
            return  # Ctrl-C just after a regular checkpoint of the same step
        self.check_finite()
        work = final.with_name(f".{final.name}.tmp")
        if self.args.should_save:
            work.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self._save_optimizer_and_scheduler(str(work))
        self._save_scaler(str(work))
        self._save_rng_state(str(work))
        if self.args.should_save:
            if self.adapter is not None:
                st.save(self.trained, work / "adapter", name=self.adapter)
            write_tensors(self.trained, self.adapter, work)
            self.state.save_to_json(str(work / "trainer_state.json"))
            self.seconds = time.perf_counter() - self.since
            write_json(work / PROGRESS, {"step": self.state.global_step, "tokens": self.tokens, "seconds": self.seconds})
            flush(work)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            os.replace(work, final)
            self.folder.remove_older_checkpoints(self.keep)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with intact(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with intact(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.restore(Path(resume_from_checkpoint))

    def restore(self, folder: Path) -> None:
        """Take over a checkpoint's tensors and counters."""
        read_tensors(self.trained, self.adapter, folder)
        progress = read_json(folder / PROGRESS)
        self.tokens, self.seconds = int(progress["tokens"]), float(progress["seconds"])


class _FollowEpochs(TrainerCallback):
    """Tells the order which epoch begins, from the step count (a resumed run begins in the middle of one)."""

    def __init__(self, order: LengthGroupedSampler, args: TrainingArguments, rows: int) -> None:
        batches = math.ceil(rows / (args.train_batch_size * args.world_size))
        self.order, self.steps = order, max(1, math.ceil(batches / args.gradient_accumulation_steps))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.order.set_epoch(state.global_step // self.steps)


class _StopAtNonFinite(TrainerCallback):
    """Ends a run in the step that makes its adapter non-finite; of a whole model, that is asked at checkpoints and at the end only."""

    def __init__(self, trainer: SlimTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.check_finite()


def _full_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
