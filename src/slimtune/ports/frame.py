"""Frame: where virtual tokens stand in each row of a batch, and what masks and positions follow from that.

Each row has p of its own, P is the largest. Virtual tokens stand right before the first real token of their row, and what is missing to P is
masked, so that a row sees just what it sees alone: distances, positions and the place of its first token are the same in any batch.

    causal            [P - p masked] [f pads] [p virtual] [n - f tokens]     f: pads in front of the first token, as the mask says
    bidirectional     [f pads] [p virtual] [n - f tokens] [P - p masked]     so the first place is that of the row alone: poolers read it
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The virtual tokens of one batch.

    Args:
        P: of the longest prompt.
        p: virtual tokens of each row [B, 1], or one number for all.
        skip: positions each row leaves free in front of everything, [B, 1] or one number.
        f: pads before the first token [B, 1], or 0 where no mask was given.
        causal: the body is causal.
        key: p and skip of every row as plain numbers, to compare two plans by.
    """

    P: int
    p: Tensor | int
    skip: Tensor | int
    f: Tensor | int
    causal: bool
    key: tuple[object, object] = (0, 0)

    @property
    def even(self) -> bool:
        """Whether all rows have the same number of virtual tokens."""
        return isinstance(self.p, int)

    @property
    def moved(self) -> Tensor | int:
        """How far the positions of each row's own tokens move."""
        return self.p + self.skip

    def order(self, n: int, device: torch.device) -> Tensor | None:
        """Return, for each place of the row [P + n], where it is taken from in [P virtual, n given]: [B, P + n]; None: as it is."""
        if isinstance(self.f, int) and (self.causal or self.even):
            return None
        length = self.P + n
        j = torch.arange(length, device=device)[None]
        gap = self.P - self.p
        if not self.causal:
            j = (j + gap) % length
        pads = (j >= gap) & (j < gap + self.f)
        virtual = (j >= gap + self.f) & (j < self.P + self.f)
        return torch.where(pads, j + self.p, torch.where(virtual, j - self.f, j))

    def arrange(self, t: Tensor) -> Tensor:
        """Put [B, P + n, ...] in order."""
        order = self.order(t.shape[1] - self.P, t.device)
        if order is None:
            return t
        order = order.expand(t.shape[0], -1)
        return t.gather(1, order if t.dim() == 2 else order[..., None].expand(-1, -1, *t.shape[2:]))

    def mask(self, mask: Tensor) -> Tensor:
        """Return the mask [B, P + n] for a mask [B, n] of the given tokens (so far, where a cache holds earlier ones)."""
        if self.P == 0:
            return mask
        return self.arrange(torch.cat([self.real(mask), mask], 1))

    def real(self, like: Tensor) -> Tensor:
        """Return which of the P places hold a virtual token: [B, P], in the type of a mask."""
        if self.even:
            return like.new_ones(like.shape[0], self.P)
        return (torch.arange(self.P, device=like.device)[None] >= self.P - self.p).to(like.dtype).expand(like.shape[0], -1)

    def positions(self, own: Tensor, start: int, first: bool) -> Tensor:
        """Return position ids, given those the tokens have by themselves.

        Args:
            own: [..., B or 1, n]; one before the first position is that of a pad, and does not move.
            start: the body's first position.
            first: the virtual tokens are in this call; if not, a cache holds them.
        """
        tokens = torch.where(own < start, own, own + self.moved)
        if not first or self.P == 0:
            return tokens
        ahead = (torch.arange(self.P, device=own.device)[None] - (self.P - self.p)).clamp(min=0) + self.skip + start  # [B or 1, P]
        rows = max(ahead.shape[0], tokens.shape[-2])
        both = torch.cat([ahead.expand(*tokens.shape[:-2], rows, -1).to(tokens.dtype), tokens.expand(*tokens.shape[:-2], rows, -1)], -1)
        order = self.order(own.shape[-1], own.device)
        if order is None:
            return both
        rows = max(rows, order.shape[0])
        return both.expand(*both.shape[:-2], rows, -1).gather(-1, order.expand(*both.shape[:-2], rows, -1))

    def by_itself(self, n: int, past: int | Tensor, start: int, device: torch.device, ids: Tensor | None = None) -> Tensor:
        """Return the positions that the tokens of rows with a prompt have without it: they count from the first token, not from the pads.

        Args:
            n, past: tokens of this call and before it.
            start: the body's first position.
            device: of the positions.
            ids: the tokens [B, n]. A body that starts at padding_idx + 1 counts these by what is no pad, wherever it stands and whatever the
                mask says; it cannot tell them among embeddings, so rows with virtual tokens count every token.
        """
        count = torch.arange(n, device=device)[None] + past
        if not isinstance(self.f, int):
            prompted = torch.as_tensor(self.moved, device=device) > 0
            count = (count - torch.where(prompted, self.f, 0)).clamp(min=0)
        if ids is None or start == 0:
            return count + start
        real = (ids != start - 1).long()  # [B, n]
        return torch.where(torch.as_tensor(self.p, device=device) > 0, count, (real.cumsum(1) + past) * real - 1) + start

    def strip(self, t: Tensor, dim: int = 1) -> Tensor:
        """Take the virtual tokens out of [B, .., P + n (at dim), ...]."""
        n = t.shape[dim] - self.P
        if self.causal or isinstance(self.p, int):
            return t.narrow(dim, self.P, n)
        at = self.p + torch.arange(n, device=t.device)[None]  # [B, n]
        at = at.view(t.shape[0], *[1] * (dim - 1), n, *[1] * (t.dim() - dim - 1))
        return t.gather(dim, at.expand(*t.shape[:dim], n, *t.shape[dim + 1 :]))


def leading(mask: Tensor | None) -> Tensor | int:
    """Return how many zeros each row of a mask [B, n] starts with: [B, 1]; 0 without a mask."""
    return 0 if mask is None else (mask != 0).int().argmax(1, keepdim=True)


def frame(
    counts: list[int] | int, skips: list[int] | int, mask: Tensor | None, causal: bool, device: torch.device
) -> Frame:
    """Build a frame.

    Args:
        counts: virtual tokens of each row, or of every row.
        skips: positions to leave free.
        mask: of the given tokens [B, n], or None.
    """
    if not isinstance(counts, int) and len(set(counts)) == 1:
        counts = counts[0]
    if not isinstance(skips, int) and len(set(skips)) == 1:
        skips = skips[0]
    p = counts if isinstance(counts, int) else torch.tensor(counts, device=device)[:, None]
    skip = skips if isinstance(skips, int) else torch.tensor(skips, device=device)[:, None]
    key = (counts if isinstance(counts, int) else tuple(counts), skips if isinstance(skips, int) else tuple(skips))
    return Frame(counts if isinstance(counts, int) else max(counts), p, skip, leading(mask), causal, key)


def left_padded(rows: Tensor, P: int) -> Tensor:
    """Fill virtual tokens [m, p, d] up to P in front."""
    return rows if rows.shape[1] == P else F.pad(rows, (0, 0, P - rows.shape[1], 0))
