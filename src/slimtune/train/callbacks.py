"""What a training run shows and writes while it goes: progress, metrics.jsonl, and adapters from a plain Trainer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.integrations.trainer import quantised_base
from slimtune.train.report import duration, read_metrics
from slimtune.train.runs import write_text


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each line on disk before the next step.

    Args:
        path: the file.
        keep_to: a resumed run goes on after this step: later rows, and a line cut short by a kill, are dropped.
    """

    def __init__(self, path: Path, keep_to: int = 0) -> None:
        self.path = path
        rows = [r for r in read_metrics(path) if r["step"] <= keep_to]
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()


class MetricsCallback(TrainerCallback):
    """Writes what the Trainer logs under short names.

    A training row has step, epoch, loss, lr, grad_norm, tokens, seconds, tokens_per_second; a held-out row has step and eval_*.
    """

    def __init__(self, file: MetricsFile) -> None:
        self.file = file

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:  # the keywords are the Trainer's protocol
        if not state.is_world_process_zero or not logs:
            return
        row: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            row |= {"epoch": round(logs["epoch"], 4), "loss": logs["loss"], "lr": logs["learning_rate"]}
        row |= {k: v for k, v in logs.items() if k in ("grad_norm", "tokens", "seconds", "tokens_per_second") or k.startswith("eval_")}
        if len(row) > 1:
            self.file.write(row)


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, tokens per second and time left; plain lines when the output is not a terminal.

    Args:
        seconds_between_lines: for plain lines.
    """

    def __init__(self, seconds_between_lines: float = 15.0) -> None:
        self.every = seconds_between_lines
        self.bar: Any = None
        self.task: Any = None
        self.shown: dict[str, float] = {}
        self.last_line = 0.0
        self.started = (0, 0.0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.started = (state.global_step, time.perf_counter())
        self.last_line = time.perf_counter()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.shown |= {k: v for k, v in logs.items() if k in ("loss", "tokens_per_second", "eval_loss", "eval_accuracy")}
        text = self.figures()
        if self.bar is not None:
            self.bar.update(self.task, figures=text)
        elif "loss" in logs and (time.perf_counter() - self.last_line >= self.every or state.global_step == state.max_steps):
            self.last_line = time.perf_counter()
            first, began = self.started
            done = max(1, state.global_step - first)
            left = (state.max_steps - state.global_step) * (self.last_line - began) / done
            print(f"step {state.global_step}/{state.max_steps}  {text}  left {duration(left)}", file=sys.stderr, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen (also after an error)."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def figures(self) -> str:
        """The text beside the bar."""
        parts = [f"loss {self.shown['loss']:.4f}"] if "loss" in self.shown else []
        parts += [f"{self.shown['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in self.shown else []
        parts += [f"held-out loss {self.shown['eval_loss']:.4f}"] if "eval_loss" in self.shown else []
        parts += [f"accuracy {self.shown['eval_accuracy']:.3f}"] if "eval_accuracy" in self.shown else []
        return "  ".join(parts)


class AdapterCallback(TrainerCallback):
    """Saves an adapter into a folder `adapter/` of every checkpoint, and of the output folder when training ends.

    Needless since a Trainer's own checkpoints hold the adapters that train (`integrations.trainer`); it stays for scripts that read these
    folders.

    Args:
        name: the adapter to save.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any) -> None:
        self._save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "adapter", state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._save(Path(str(args.output_dir)) / "adapter", state, model)

    def _save(self, folder: Path, state: TrainerState, model: nn.Module | None) -> None:
        import slimtune as st

        if state.is_world_process_zero and model is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            st.save(model, folder, name=self.name)


__all__ = ["AdapterCallback", "MetricsCallback", "MetricsFile", "ProgressCallback", "quantised_base"]
