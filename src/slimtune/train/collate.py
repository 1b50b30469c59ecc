"""Batches: padding to the longest row (a multiple of 8 tokens), and an order that puts rows of similar length together."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from slimtune.train.tokens import IGNORE

_BATCHES_PER_POOL = 50  # sorted within, shuffled between: little padding, yet no batch is the same in two epochs


@dataclass(frozen=True)
class Collator:
    """Makes one batch of examples: input_ids and attention_mask [n, t], and labels [n, t] or, for classes, [n].

    Args:
        pad_id: the token to pad with; masked in the attention, and in the loss.
        multiple: t is a multiple of this.
        left: pad on the left (for generation).
    """

    pad_id: int
    multiple: int = 8
    left: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(e["input_ids"]) for e in examples)
        length = math.ceil(longest / self.multiple) * self.multiple
        batch = {
            "input_ids": self._rows([e["input_ids"] for e in examples], length, self.pad_id),
            "attention_mask": self._rows([[1] * len(e["input_ids"]) for e in examples], length, 0),
        }
        if "labels" in examples[0]:
            batch["labels"] = self._rows([e["labels"] for e in examples], length, IGNORE)
        elif "label" in examples[0]:
            batch["labels"] = torch.tensor([e["label"] for e in examples])
        return batch

    def _rows(self, rows: list[list[int]], length: int, fill: int) -> Tensor:
        pad = [[fill] * (length - len(row)) for row in rows]
        return torch.tensor([p + list(r) if self.left else list(r) + p for p, r in zip(pad, rows, strict=True)])


class LengthGroupedSampler(Sampler[int]):
    """An order of the rows in which each batch holds rows of similar length; the same for the same seed and epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one batch, over all processes.
        seed: of the shuffle; `set_epoch` changes the order from epoch to epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_grouped_order(self.lengths, self.batch_size, self.seed * 1_000_003 + self.epoch))


def length_grouped_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """Return a permutation of the rows: shuffled, sorted by length within pools of 50 batches, batches shuffled.

    The batch with the longest row comes first, so that a machine with too little memory fails at once.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * _BATCHES_PER_POOL
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        rows = sorted(order[start : start + pool], key=lambda i: -lengths[i])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if not batches:
        return []
    short = [b for b in batches if len(b) < batch_size]  # a batch that is not full must come last, or every later one shifts
    full = [b for b in batches if len(b) == batch_size]
    rng.shuffle(full)
    if full:
        first = max(range(len(full)), key=lambda i: max(lengths[j] for j in full[i]))
        full[0], full[first] = full[first], full[0]
    return [i for b in [*full, *short] for i in b]
