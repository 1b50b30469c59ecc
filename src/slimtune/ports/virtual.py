"""What virtual tokens a plan means at one site: a stack puts prompts one after the other, a weighted sum adds prompts of one length."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimtune.core.errors import CapabilityError
from slimtune.core.fold import Chain, entries, members, put, take
from slimtune.core.op import Op
from slimtune.core.plan import Plan
from slimtune.core.site import Site
from slimtune.core.tasks import tasks_of
from slimtune.ports.frame import Frame, frame, left_padded

Segment: TypeAlias = "tuple[slice | Tensor | None, Chain, list[int] | None]"


class StreamOp(Op):
    """Base of every op at the stream port.

    Attributes:
        tokens: p, how many virtual tokens it puts in front; may be 0.
        shift: positions it leaves free before them, without tokens.
        keep: the body's output keeps the virtual tokens in front, so that heads which read the first place read the first of them.
    """

    tokens: int = 0
    shift: int = 0
    keep: bool = False

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        """Return the virtual tokens: [p, d], or [m, p, d] where rows differ.

        Args:
            x: the embedded tokens of the m rows this op acts on [m, n, d].
            tasks: task of each of them [m], if `st.tasks` has said so.
        """
        raise NotImplementedError


class ReaderOp(Op):
    """On the decoder of an encoder-decoder: the encoder's output is `tokens` longer than its input. Nothing to train."""

    def __init__(self, site: Site, tokens: int) -> None:
        super().__init__(site)
        self.tokens = tokens

    def settings(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


def has_port(host: Any, plan: Plan, ports: set[str]) -> bool:
    """Tell whether a plan has an op at one of some ports of a host."""
    return any(op.port in ports for name in plan.names for op in host.slim.ops(name))


def at_port(chain: Chain, port: str) -> Chain:
    """Return the part of a chain that sits at one port."""
    found: Chain = []
    for link in chain:  # plain loops: this is compiled
        kept: list[tuple[Op, Tensor | None]] = []
        for entry, w in link:
            ops = [op for op in members(entry) if op.port == port]
            if ops:
                kept += entries(ops, w)
        if kept:
            found.append(kept)
    return found


def every(chain: Chain) -> list[Any]:
    """Return all ops of a chain."""
    return [op for link in chain for entry, _ in link for op in members(entry)]


def measure(chain: Chain, where: str) -> tuple[int, int]:
    """Return (virtual tokens, shift) of a chain.

    Raises:
        CapabilityError: a weighted sum of prompts of different lengths.
    """
    tokens = shift = 0
    for link in chain:
        ops: list[list[Any]] = [members(entry) for entry, _ in link]
        sizes = {(sum(op.tokens for op in e), sum(op.shift for op in e if isinstance(op, StreamOp))) for e in ops}
        if len(sizes) > 1:
            raise CapabilityError(
                f"a weighted sum adds prompts token by token, and these are {', '.join(str(max(s)) for s in sorted(sizes))} tokens long",
                where=where,
                hint="stack them (a list of names) to put one after the other, or train prompts of one length",
            )
        tokens, shift = tokens + next(iter(sizes))[0], shift + next(iter(sizes))[1]
    return tokens, shift


def segments(host: Any, plan: Plan, batch: int, device: torch.device, port: str) -> list[Segment]:
    """Return (rows, chain, row numbers) of each segment of a plan at one port; rows are None where the plan is the same for all."""
    if plan.size is None:
        return [(None, at_port(host.slim.chain(plan.segments[0][1]), port), None)]
    k = batch // plan.size
    chosen = plan.selectors(batch, device, host.slim.path, type(host).__name__)
    found: list[Segment] = []
    for rows, (numbers, links) in zip(chosen, plan.segments, strict=True):
        own = list(range(plan.size)) if numbers is None else numbers
        found.append((rows, at_port(host.slim.chain(links), port), [i * k + j for i in own for j in range(k)]))
    return found


def framed(host: Any, parts: list[Segment], batch: int, mask: Tensor | None, causal: bool, device: torch.device) -> Frame:
    """Return the frame of a batch."""
    where = f"{host.slim.path} ({type(host).__name__})"
    sizes = [measure(chain, where) for _, chain, _ in parts]
    if parts[0][0] is None:
        return frame(*sizes[0], mask, causal, device)
    counts, skips = [0] * batch, [0] * batch
    for (p, s), (_, _, numbers) in zip(sizes, parts, strict=True):
        for i in numbers or ():
            counts[i], skips[i] = p, s
    return frame(counts, skips, mask, causal, device)


def virtual_tokens(host: Any, plan: Plan, parts: list[Segment], x: Tensor, P: int) -> Tensor:
    """Return the virtual tokens of a batch [B, P, d], filled up in front with zeros."""
    tasks = tasks_of(host.slim.state, x.shape[0], x.device, plan.expand)
    if parts[0][0] is None:
        return joined(parts[0][1], x, tasks).expand(x.shape[0], -1, -1)
    out = x.new_zeros(x.shape[0], P, x.shape[-1])
    for rows, chain, _ in parts:
        if chain:
            assert rows is not None
            mine = take(x, rows, 0)
            made = joined(chain, mine, None if tasks is None else take(tasks, rows, 0))
            if made.shape[1]:
                out = put(out, rows, left_padded(made, P).expand(mine.shape[0], -1, -1), 0)
    return out


def joined(chain: Chain, x: Tensor, tasks: Tensor | None) -> Tensor:
    """Return the virtual tokens of one chain, [1 or m, p, d]: links one after the other."""
    found = []
    for link in chain:
        total: Tensor | None = None
        for entry, w in link:
            rows = _together([op.rows(x, tasks) for op in members(entry) if op.tokens], x)  # type: ignore[attr-defined, operator]
            rows = rows if w is None else (w * rows).to(x.dtype)
            total = rows if total is None else total + rows
        if total is not None:
            found.append(total)
    return _together(found, x)


def _together(parts: list[Tensor], x: Tensor) -> Tensor:
    """Return prompts [p, d] or [m, p, d] one after the other, [1 or m, p, d], in the type of x."""
    if not parts:
        return x.new_zeros(1, 0, x.shape[-1])
    whole = [(t[None] if t.dim() == 2 else t).to(device=x.device, dtype=x.dtype) for t in parts]
    m = max([t.shape[0] for t in whole])
    return torch.cat([t.expand(m, -1, -1) for t in whole], 1)
