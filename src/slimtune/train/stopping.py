"""Ctrl-C and SIGTERM: finish the step, save, stop, and say how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimtune.train.trainer import SlimTrainer


class Stopped(Exception):
    """Training was stopped by the user and saved; the message says how to go on."""


class StopOnSignal(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the current step, saves, and stops; a second one stops at once."""

    def __init__(self, trainer: SlimTrainer) -> None:
        self.trainer, self.asked = trainer, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals cannot be caught here; the caller's own handling stays
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            print("\nstopping after this step and saving (again: stop at once)", file=sys.stderr, flush=True)

        earlier = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, h in earlier.items():
                signal.signal(s, h)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.start_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps  # the last step has a row, whatever log_every is
        if self.trainer.anyone(self.asked) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
