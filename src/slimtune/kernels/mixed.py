"""A different low-rank pair for each row of a small batch: y_j += s_i B_i (A_i x_j) for row j with adapter i, without gradients.

Meant for decoding: few tokens, many adapters, where a loop over adapters is all overhead. Two forms:

    one token a row, on a CPU, pairs that live in a bank    torch's sampled product reads the pairs where they lie: of x A^T with the A of
                                                            all adapters it forms only the r numbers of each row that are asked for, and
                                                            in the same way the b outputs. What depends on the mixture is an index.
    anything else                                           the pairs of the mixture side by side (taken from the bank by number, or from
                                                            the parameters), rows padded to the largest group, two batched products

FLOPs 2 S m r (a + b) for S adapters with m rows in the largest group; 2 k r (a + b) for k rows in the first form. It reads each pair once; both
are bound by that: 32 adapters r=16 on 576 x 576 are 2.4 MB where the frozen weight in bfloat16 is 0.7.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.sparse import sampled_addmm

from slimtune.core.bank import Place, Room
from slimtune.kernels.gain import is_kept

SMALL = 2**21  # bytes of a stack in float32 up to which CPUs multiply it faster than in half precision, whose calls cost more than its reads


class Mixture:
    """Which rows of a batch have which adapter; rows with none are left out.

    Attributes:
        names: [S] of the adapters.
        weights: [S] each one's weight; None: all are 1.
        rows: [S] row numbers of each.
        batch: rows in all.
        pick: returns what a dictionary holds under these names.
    """

    def __init__(self, names: list[str], weights: list[float | None], rows: list[list[int]], batch: int) -> None:
        self.names, self.rows, self.batch = names, rows, batch
        self.weights = None if all(w is None for w in weights) else [1.0 if w is None else w for w in weights]
        self.pick: Callable[[dict[str, Any]], Sequence[Any]] = itemgetter(*names) if len(names) > 1 else lambda held: (held[names[0]],)
        self.all = tuple(range(len(names)))
        self._kept: dict[Any, Any] = {}

    def kept(self, make: Any, *key: Any) -> Any:
        """Return make(self, *key), made once."""
        at = (make, *key)
        found = self._kept.get(at)
        if found is None:
            found = self._kept[at] = make(self, *key)
        return found


def add_mixed(y: Tensor, x: Tensor, mixture: Mixture, places: Sequence[Place | None]) -> Tensor:
    """Return y [B, t, b] (or [B, b]) with every adapter's low-rank product of x [B, t, a] added in place.

    Args:
        places: [S] where the pair of each adapter lies; None: it has none here.
    """
    if not y.is_contiguous() or y._is_view() or is_kept(y):
        y = y.clone(memory_format=torch.contiguous_format)
    room = places[0].room if places[0] is not None else None
    if room is not None and all([p is not None and p.room is room for p in places]):
        return _add(y, x, mixture, mixture.all, places, room)  # type: ignore[arg-type]
    alike: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        if place is not None:
            A, B = place.pair()
            alike.setdefault((id(place.room), A.shape, A.dtype, B.dtype), []).append(i)
    for members in alike.values():
        found = [places[i] for i in members]
        y = _add(y, x, mixture, tuple(members), found, found[0].room)  # type: ignore[arg-type, union-attr]
    return y


def _add(y: Tensor, x: Tensor, mixture: Mixture, members: tuple[int, ...], places: Sequence[Place], room: Room | None) -> Tensor:
    scales = [p.scale for p in places]
    if mixture.weights is not None:
        scales = [s * mixture.weights[i] for s, i in zip(scales, members, strict=True)]
    if room is not None and x.numel() == x.shape[0] * x.shape[-1] and room.sampled and torch.promote_types(room.A.dtype, x.dtype) == room.A.dtype:
        return _add_in_place(y, x, mixture, members, tuple([p.number for p in places]), scales, room)
    return _add_gathered(y, x, mixture, members, places, scales, room)


# ---- read where they lie ------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """The entries of a product that are formed: for each of k rows the `width` columns that belong to its place; `values` [k, width]."""

    pattern: Tensor
    values: Tensor


def _sample(at: Tensor, width: int, places: int, dtype: torch.dtype) -> Sample:
    """Return a sample for rows with these places [k]."""
    index = torch.int32 if places * width < 2**31 else torch.int64
    columns = (at[:, None] * width + torch.arange(width)).flatten().to(index)
    starts = torch.arange(0, len(columns) + 1, width, dtype=index)
    values = torch.zeros(len(columns), dtype=dtype)
    _say_nothing_of_beta()
    pattern = torch.sparse_csr_tensor(starts, columns, values, size=(len(at), places * width), check_invariants=False)
    return Sample(pattern, pattern.values().view(len(at), width))


@functools.cache
def _say_nothing_of_beta() -> None:
    """Have torch say, where nobody hears it, what it says of sparse tensors once in a process. (Filters set each time would reset others'.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def _row_scales(mixture: Mixture, members: tuple[int, ...], scales: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    of_row = {j: s for i, s in zip(members, scales, strict=True) for j in mixture.rows[i]}
    return torch.tensor([[of_row[j]] for j in sorted(of_row)], dtype=dtype)  # [k, 1]


@dataclass
class Reading:
    """How the rows of a mixture read a room: row numbers (None: all), samples of both products."""

    rows: Tensor | None
    down: Sample
    up: Sample


def _reading(
    mixture: Mixture, members: tuple[int, ...], numbers: tuple[int, ...], r: int, b: int, places: int, dtype: torch.dtype, thread: int
) -> Reading:
    number_of = {j: number for i, number in zip(members, numbers, strict=True) for j in mixture.rows[i]}
    rows = sorted(number_of)
    at = torch.tensor([number_of[j] for j in rows])
    with torch.inference_mode(False):  # the plan may be used outside of one later
        return Reading(None if len(rows) == mixture.batch else torch.tensor(rows), _sample(at, r, places, dtype), _sample(at, b, places, dtype))


def _add_in_place(
    y: Tensor, x: Tensor, mixture: Mixture, members: tuple[int, ...], numbers: tuple[int, ...], scales: list[float], room: Room
) -> Tensor:
    dtype, me = room.A.dtype, threading.get_ident()  # two threads may run one plan, so each has values of its own
    reading: Reading = mixture.kept(_reading, members, numbers, room.r, room.b, room.places, dtype, me)
    rows, down, up = reading.rows, reading.down, reading.up
    xs, ys = x.view(x.shape[0], -1), y.view(y.shape[0], -1)
    part = ys
    if rows is not None:
        xs, part = xs.index_select(0, rows), ys.index_select(0, rows)
    same = scales.count(scales[0]) == len(scales)
    down.values.zero_()  # beta=0 would keep an infinity of the last batch as a NaN
    sampled_addmm(down.pattern, xs.to(dtype), room.down, beta=0.0, out=down.pattern)  # [k, a] @ [a, places r] -> [k, r]
    h = down.values if same else down.values.mul_(mixture.kept(_row_scales, members, tuple(scales), dtype))
    up.values.copy_(part)
    sampled_addmm(up.pattern, h, room.up, alpha=scales[0] if same else 1.0, out=up.pattern)  # [k, r] @ [r, places b] -> [k, b]
    if rows is None:
        ys.copy_(up.values)
    else:
        ys.index_copy_(0, rows, up.values.to(y.dtype))
    return y


# ---- side by side -------------------------------------------------------------------------------------------------------
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


def groups(mixture: Mixture, members: tuple[int, ...], device: torch.device) -> Groups:
    """Pad groups of row numbers to the same length."""
    rows = [mixture.rows[i] for i in members]
    m = max(len(r) for r in rows)
    index = [r[j] if j < len(r) else r[0] for r in rows for j in range(m)]
    real = [i * m + j for i, r in enumerate(rows) for j in range(len(r))]
    flat = [j for r in rows for j in r]
    order = ""
    if index == list(range(mixture.batch)):
        order = "blocks"
    elif index == [i + len(rows) * j for i in range(len(rows)) for j in range(m)] and len(index) == mixture.batch:
        order = "turns"
    at, rows_at, real_at = (torch.tensor(v, dtype=torch.long, device=device) for v in (index, flat, real))
    return Groups(at, real_at if len(real) != len(index) else None, rows_at, m, order)


def _add_gathered(
    y: Tensor, x: Tensor, mixture: Mixture, members: tuple[int, ...], places: Sequence[Place], scales: list[float], room: Room | None
) -> Tensor:
    g: Groups = mixture.kept(groups, members, x.device)
    S, tokens, dtype = len(places), x.numel() // x.shape[-1] // x.shape[0], x.dtype
    if room is None:
        pairs = [p.pair() for p in places]
        A, B = torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])  # [S, r, a], [S, b, r]
    else:
        at = torch.tensor([p.number for p in places])
        A, B = room.A.index_select(0, at), room.B.index_select(0, at)
    if A.device.type == "cpu" and 4 * max(A.numel(), B.numel()) <= SMALL:
        dtype = torch.promote_types(dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype).transpose(1, 2)
    wide = x if x.dtype == dtype else x.to(dtype)
    turns = g.order == "turns" and tokens == 1
    if g.order == "blocks":
        xs = wide.view(S, -1, x.shape[-1])  # [S, m t, a]
    else:
        xs = wide.view(g.m, S, -1).transpose(0, 1) if turns else wide.index_select(0, g.index).view(S, -1, x.shape[-1])
    h = torch.bmm(xs, A.transpose(1, 2))  # [S, m t, a] @ [S, a, r]
    h.mul_(scales[0] if scales.count(scales[0]) == S else torch.tensor(scales, dtype=dtype, device=h.device).view(-1, 1, 1))
    if g.order == "blocks" or turns:
        ys = y.view(S, -1, y.shape[-1]) if g.order == "blocks" else y.view(g.m, S, -1).transpose(0, 1)
        if y.dtype == dtype:
            ys.baddbmm_(h, B)  # [S, m t, r] @ [S, r, b]
        else:
            ys.add_(torch.bmm(h, B))
        return y
    d = torch.bmm(h, B).to(y.dtype).view(S * g.m, *y.shape[1:])
    return y.index_add_(0, g.rows, d if g.real is None else d.index_select(0, g.real))
