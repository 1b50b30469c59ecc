"""A different low-rank pair for each row of a small batch, in two batched products instead of one pair of products per adapter.

y[rows of i] += s_i x[rows of i] A_i^T B_i^T for S adapters. The pairs of a plan are stacked once, cast to the data's type and kept beside the
slot until a parameter changes (its version counter says so); rows are padded to the largest group. Meant for decoding: few tokens, many
adapters, where a loop over adapters is all overhead. FLOPs 2 S m r (a + b) for m rows in the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]


@dataclass
class Stacked:
    """Pairs of one site stacked for one plan: A [S, a, r], B [S, r, b] (scaled)."""

    sources: list[Tensor]
    versions: list[int]
    A: Tensor
    B: Tensor

    def fresh(self) -> bool:
        """Tell whether the stack still holds the very values of its sources."""
        return [t._version for t in self.sources] == self.versions


def stack(pairs: list[Pair], dtype: torch.dtype) -> Stacked:
    """Stack pairs (A [r, a], B [b, r], s) of equal rank."""
    sources = [t for A, B, _ in pairs for t in (A, B)]
    A = torch.stack([A.detach().to(dtype) for A, _, _ in pairs]).transpose(1, 2).contiguous()  # [S, a, r]
    B = torch.stack([(B.detach() * s).to(dtype).T for _, B, s in pairs]).contiguous()  # [S, r, b]
    return Stacked(sources, [t._version for t in sources], A, B)


@dataclass(frozen=True)
class Groups:
    """Rows of a batch by adapter: index [S m] (padding repeats a row), real [k] positions in it that are no padding, rows [k]."""

    index: Tensor
    real: Tensor | None
    rows: Tensor
    m: int


def groups(rows: list[list[int]], device: torch.device) -> Groups:
    """Pad groups of row numbers to the same length."""
    m = max(len(r) for r in rows)
    index = [r[j] if j < len(r) else r[0] for r in rows for j in range(m)]
    real = [i * m + j for i, r in enumerate(rows) for j in range(len(r))]
    flat = [j for r in rows for j in r]
    padded = len(real) != len(index)
    at, rows_at, real_at = (torch.tensor(v, dtype=torch.long, device=device) for v in (index, flat, real))
    return Groups(at, real_at if padded else None, rows_at, m)


def add_mixed(y: Tensor, x: Tensor, stacked: Stacked, g: Groups) -> Tensor:
    """Return y [B, t, b] (or [B, b]) with every group's low-rank product of x [B, t, a] added in place; without gradient."""
    S, m = stacked.A.shape[0], g.m
    xs = x.index_select(0, g.index).view(S, -1, x.shape[-1])  # [S, m t, a]
    d = torch.bmm(torch.bmm(xs, stacked.A), stacked.B)  # [S, m t, a] @ [S, a, r] @ [S, r, b]
    d = d.view(S * m, *y.shape[1:])
    return y.index_add_(0, g.rows, d if g.real is None else d.index_select(0, g.real))
