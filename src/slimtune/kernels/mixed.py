"""A different low-rank pair for each row of a small batch, in two batched products instead of one pair of products per adapter.

y[rows of i] += s_i x[rows of i] A_i^T B_i^T for S adapters. The pairs of a plan are stacked once and kept beside the slot until a parameter
changes (its version counter says so). Rows that lie in a regular order are read and written in place, others are gathered, padded to the
largest group. Meant for decoding: few tokens, many adapters, where a loop over adapters is all overhead.
FLOPs 2 S m r (a + b) for m rows in the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor, float]

SMALL = 2**21  # bytes of a stack in float32 up to which CPUs multiply it faster than in half precision, whose calls cost more than its reads


@dataclass
class Stacked:
    """Pairs of one site stacked for one plan: A [S, r, a], B [S, r, b] (scaled).

    `sources` are detached twins, which share the version counters of what they were made from. Made one after the other, they lie close
    together: asking thousands of parameters for their versions costs what it takes to reach them in memory.
    """

    sources: list[Tensor]
    versions: list[int]
    A: Tensor
    B: Tensor

    def fresh(self) -> bool:
        """Tell whether the stack still holds the very values of its sources."""
        return [t._version for t in self.sources] == self.versions


def stack(pairs: list[Pair], dtype: torch.dtype) -> Stacked:
    """Stack pairs (A [r, a], B [b, r], s) of equal rank, in the data's type or in float32, whichever is faster."""
    sources = [t.detach() for A, B, _ in pairs for t in (A, B)]
    A, B, _ = pairs[0]
    if A.device.type == "cpu" and 4 * len(pairs) * max(A.numel(), B.numel()) <= SMALL:
        dtype = torch.promote_types(dtype, torch.float32)
    As = torch.stack([A.detach().to(dtype) for A, _, _ in pairs])  # [S, r, a]
    Bs = torch.stack([(B.detach() * s).to(dtype).T for _, B, s in pairs]).contiguous()  # [S, r, b]
    return Stacked(sources, [t._version for t in sources], As, Bs)


@dataclass(frozen=True)
class Groups:
    """Rows of a batch by adapter.

    Attributes:
        index: [S m] row numbers, group after group; padding repeats a row.
        real: [k] positions in `index` that are no padding; None: all.
        rows: [k] row numbers of those.
        m: rows in the largest group.
        order: how rows lie when all of a batch are in groups of m: "blocks" (group after group), "turns" (one row of each group after the
            other), "" for any other order.
    """

    index: Tensor
    real: Tensor | None
    rows: Tensor
    m: int
    order: str


def groups(rows: list[list[int]], batch: int, device: torch.device) -> Groups:
    """Pad groups of row numbers to the same length."""
    m = max(len(r) for r in rows)
    index = [r[j] if j < len(r) else r[0] for r in rows for j in range(m)]
    real = [i * m + j for i, r in enumerate(rows) for j in range(len(r))]
    flat = [j for r in rows for j in r]
    padded = len(real) != len(index)
    order = ""
    if index == list(range(batch)):
        order = "blocks"
    elif index == [i + len(rows) * j for i in range(len(rows)) for j in range(m)] and len(index) == batch:
        order = "turns"
    at, rows_at, real_at = (torch.tensor(v, dtype=torch.long, device=device) for v in (index, flat, real))
    return Groups(at, real_at if padded else None, rows_at, m, order)


def add_mixed(y: Tensor, x: Tensor, stacked: Stacked, g: Groups) -> Tensor:
    """Return y [B, t, b] (or [B, b]) with every group's low-rank product of x [B, t, a] added in place; without gradient."""
    A, B = stacked.A, stacked.B
    S, tokens = A.shape[0], x.numel() // x.shape[-1] // x.shape[0]
    wide = x if x.dtype == A.dtype else x.to(A.dtype)
    if g.order == "blocks" or (g.order == "turns" and tokens == 1):
        blocks = g.order == "blocks"
        xs = wide.view(S, -1, x.shape[-1]) if blocks else wide.view(g.m, S, -1).transpose(0, 1)  # [S, m t, a]
        ys = y.view(S, -1, y.shape[-1]) if blocks else y.view(g.m, S, -1).transpose(0, 1)
        h = torch.bmm(xs, A.transpose(1, 2))  # [S, m t, a] @ [S, a, r]
        if y.dtype == A.dtype:
            ys.baddbmm_(h, B)
        else:
            ys.add_(torch.bmm(h, B))
        return y
    xs = wide.index_select(0, g.index).view(S, -1, x.shape[-1])
    d = torch.bmm(torch.bmm(xs, A.transpose(1, 2)), B).to(y.dtype)  # [S, m t, a] @ [S, a, r] @ [S, r, b]
    d = d.view(S * g.m, *y.shape[1:])
    return y.index_add_(0, g.rows, d if g.real is None else d.index_select(0, g.real))
