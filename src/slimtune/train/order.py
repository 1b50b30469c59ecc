"""The order of the training rows: shuffled, in groups of similar length, and a function of (seed, epoch) alone.

Because nothing else enters, a resumed run and a run on several processes see the rows in the very same order: the order is cut
into pieces of one optimiser step (all processes, all micro-batches), whatever the size of a single batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """Row numbers of one epoch.

    Args:
        lengths: tokens of each row.
        step_rows: rows of one optimiser step: batch size x micro-batches x processes.
        seed: the run's seed.
        by_length: put rows of similar length into the same step; the steps themselves stay shuffled.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, seed: int, by_length: bool) -> None:
        self.lengths, self.step_rows, self.seed, self.by_length = lengths, step_rows, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        rows: list[int] = torch.randperm(len(self.lengths), generator=draw).tolist()
        if not self.by_length:
            return iter(rows)
        pool = 50 * self.step_rows  # sorted within a pool, so that which rows meet still changes from epoch to epoch
        steps: list[list[int]] = []
        for start in range(0, len(rows), pool):
            part = sorted(rows[start : start + pool], key=lambda i: self.lengths[i])
            steps += [part[i : i + self.step_rows] for i in range(0, len(part), self.step_rows)]
        last = [steps.pop()] if steps and len(steps[-1]) < self.step_rows else []  # the short one can only stand at the end
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=draw).tolist()] + last
        return iter([i for step in shuffled for i in step])
