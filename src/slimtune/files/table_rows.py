"""Rows of a base's tables of tokens: sums in which every row has a part, since single samples miss rows that were made or drawn anew.

A table [v, d] is read at COLUMNS fixed columns. Its rows fall into up to BUCKETS ranges; of each the weighted sum and the norm are kept. Sums
may differ by a hundredth of one row: rows that transformers draws closely around the mean (resize_token_embeddings) do as well as each other, and
training shows in the samples. Between dtypes they may differ by what rounding adds up to, too. Quantised tables are not looked at.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BUCKETS, COLUMNS, TABLES = 32, 2, 8


@dataclass(frozen=True)
class TableRows:
    """What is kept of one table.

    Attributes:
        rows: v, how many it has.
        dtype: name of its type, without "torch.".
        sums: [min(v, BUCKETS), 2] float32, the weighted sum and the norm of each range of rows.
    """

    rows: int
    dtype: str
    sums: Tensor

    @staticmethod
    def of(table: Tensor) -> TableRows:
        """Read a table [v, d] of a floating type; one strided read, whatever its size."""
        v, d = table.shape
        columns = torch.tensor([(int((k + 0.5) * d / COLUMNS) + 7919 * k) % d for k in range(COLUMNS)], device=table.device)
        at = torch.arange(v)
        # Weights that differ from row to row show rows that changed places.
        x = table.detach()[:, columns].cpu().double() * ((at * 7919 % 1009 + 505).double() / 1009)[:, None]
        buckets = min(v, BUCKETS)
        bucket = at * buckets // v
        both = torch.stack([x.sum(1), x.square().sum(1)], 1)
        found = torch.zeros(buckets, 2, dtype=torch.float64).index_add(0, bucket, both)
        return TableRows(v, str(table.dtype).removeprefix("torch."), torch.stack([found[:, 0], found[:, 1].sqrt()], 1).float())

    def to_list(self) -> list[Any]:
        """Return it JSON-ready."""
        return [self.rows, self.dtype, base64.b64encode(bytes(self.sums.flatten().view(torch.uint8).tolist())).decode()]

    @staticmethod
    def from_list(data: list[Any]) -> TableRows:
        """Read what `to_list` wrote; KeyError, TypeError, ValueError or RuntimeError where it cannot be."""
        rows, dtype, text = data
        kind = getattr(torch, str(dtype), None)
        if type(rows) is not int or rows < 1 or not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"a table of {rows} rows of {dtype}")
        sums = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
        return TableRows(rows, str(dtype), sums.reshape(min(rows, BUCKETS), 2))

    def differs(self, now: TableRows) -> list[tuple[int, int]]:
        """Return the ranges (first row, one past the last) that hold rows which differ by more than rounding; neighbors are joined."""
        if self.rows != now.rows:
            return [(0, self.rows)]
        (x, size), (y, other) = self.sums.double().T, now.sums.double().T
        size = torch.minimum(size, other)
        each = self.rows / len(x)
        far = 3e-7 * torch.maximum(x.abs(), y.abs()) + 1e-2 * size / each**0.5  # sums are kept in float32
        if self.dtype != now.dtype:
            a, b = (torch.finfo(getattr(torch, name)) for name in (self.dtype, now.dtype))
            spacing = max(a.smallest_normal * a.eps, b.smallest_normal * b.eps)  # of numbers too small for the type
            far = far + 2 * max(a.eps, b.eps) * size + spacing * (COLUMNS * each) ** 0.5 * 2
        bad = ~(((x - y).abs() <= far) | (x == y) | (x.isnan() & y.isnan()))
        out: list[tuple[int, int]] = []
        for i in bad.nonzero().flatten().tolist():
            first, end = -(-i * self.rows // len(x)), -(-(i + 1) * self.rows // len(x))
            if out and out[-1][1] == first:
                first = out.pop()[0]
            out.append((first, end))
        return out


def tables(model: nn.Module, found: dict[str, tuple[nn.Module, str, nn.Parameter]]) -> list[str]:
    """Return the names in `found` of tables of tokens: embeddings, and what has as many rows as the model has tokens; the largest ones."""
    words = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            words.append(getattr(model, get)())
        except (AttributeError, NotImplementedError, TypeError):  # no language model
            continue
    sizes = {len(w) for m in words if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() == 2 and w.is_floating_point()}
    fit = [
        (-p.numel(), name) for name, (module, _, p) in found.items()
        if p.dim() == 2 and p.is_floating_point() and p.numel() and (isinstance(module, nn.Embedding) or len(p) in sizes)
    ]  # fmt: skip
    return [name for _, name in sorted(fit)[:TABLES]]


def told(name: str, ranges: list[tuple[int, int]]) -> str:
    """Return in words which rows of a table differ."""
    at = ", ".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges[:4]) + (" ..." if len(ranges) > 4 else "")
    return f"{name} holds other rows, among {at}"
