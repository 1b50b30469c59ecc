"""What a step costs: seconds (median of steps on one batch) and exact bytes. For an idle machine; scores do not depend on it."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from slimtune.arena.contenders import Contender
from slimtune.arena.fit import set_up
from slimtune.arena.tasks import Task
from slimtune.testing.live_bytes import LiveBytes
from slimtune.train.job import Job

WARM, TIMED = 2, 7


def cost(job: Job, task: Task, who: Contender, lr: float) -> dict[str, Any]:
    """Return the median seconds of a training step and the peak bytes of forward and backward over the model's own.

    The batch holds the longest rows of the first `8 * task.batch`, so that padding is the same for everybody.
    """
    setup = set_up(job, task, who, 0, WARM + TIMED)
    model = setup.model.train()
    rows = sorted((job.train_rows[i] for i in range(min(8 * task.batch, len(job.train_rows)))), key=lambda r: -len(r["input_ids"]))[: task.batch]
    batch = job.collate(rows)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    seconds = []
    for step in range(WARM + TIMED):
        began = time.perf_counter()
        model(**batch).loss.backward()
        optimiser.step()
        if setup.each_step is not None:
            setup.each_step(step)
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - began)
    gc.collect()
    with LiveBytes() as live:
        model(**batch).loss.backward()
    return {"seconds": statistics.median(seconds[WARM:]), "samples": [round(s, 4) for s in seconds[WARM:]], "peak_bytes": live.peak,
            "trainable": setup.trainable, "threads": torch.get_num_threads()}  # fmt: skip
