"""Plan: which adapters act on which rows of a batch.

A plan is a list of segments (rows, stack); a stack is a list of links, a link is a list of (adapter name, weight). It is resolved
once; what a host does per call is look up its own ops by name. Weights are 0-d tensors, so torch.compile treats them as
inputs: changing one does not compile again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.kernels.mixed import Mixture

if TYPE_CHECKING:
    from slimtune.core.fold import Chain, Part
    from slimtune.core.host import Slot

Which: TypeAlias = "str | Sequence[str] | Mapping[str, float] | None"
NameLink: TypeAlias = "list[tuple[str, Tensor | None]]"


def parse(which: Which) -> list[NameLink]:
    """Turn what the user wrote into links: a name, a list (stack), a mapping (weighted sum), None (the bare base)."""
    if which is None:
        return []
    if isinstance(which, str):
        return [[(which, None)]]
    if isinstance(which, Mapping):
        link: NameLink = []
        for name, w in which.items():
            if not isinstance(name, str) or isinstance(w, bool) or not isinstance(w, (int, float)):
                raise PlanError(f"a weighted sum maps names to numbers, not {name!r} to {w!r}", hint='{"a": 0.7, "b": 0.3}')
            if not math.isfinite(w):
                raise PlanError(f"the weight of {name!r} is {w}", hint='a finite number: {"a": 0.7, "b": 0.3}')
            link.append((name, torch.tensor(float(w), dtype=torch.float64)))
        return [link] if link else []
    if isinstance(which, Sequence):
        links = [link for part in which for link in parse(part)]
        flat = [name for link in links for name, _ in link]
        if len(set(flat)) != len(flat):
            raise PlanError(f"an adapter stands twice in one stack: {flat}", hint="name each once, or use weights")
        return links
    raise PlanError(f"cannot read {which!r} as a plan", hint='a name, a list of names, {"a": 0.7, "b": 0.3}, or None')


class Plan:
    """An immutable plan; build it with `Plan.of` or `Plan.of_rows`.

    Attributes:
        segments: (row numbers or None for all, links).
        size: number of rows the plan speaks of, None if it holds for any batch.
        names: every adapter it uses.
        expand: a batch of k * size rows means each row k times in a block (beam search, flattened tokens).
    """

    def __init__(self, segments: list[tuple[list[int] | None, list[NameLink]]], size: int | None) -> None:
        self.segments, self.size, self.expand = segments, size, False
        self.names = {name for _, links in segments for link in links for name, _ in link}
        self._selectors: dict[tuple[int, torch.device], list[slice | Tensor]] = {}
        self._mixtures: dict[int, Mixture | None] = {}
        self._blocks: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_selectors": {}, "_mixtures": {}, "_blocks": None}  # what was worked out belongs to this process and device

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_mixtures": {}, "_blocks": None} | state)

    @classmethod
    def of(cls, which: Which) -> Plan:
        """One stack for all rows."""
        return cls([(None, parse(which))], None)

    @classmethod
    def of_rows(cls, rows: Sequence[Which]) -> Plan:
        """A stack for each row; rows with the same stack share a segment."""
        if isinstance(rows, (str, Mapping)) or not isinstance(rows, Sequence) or not rows:
            raise PlanError(f"rows= takes one entry for each row of the batch, not {rows!r}", hint='rows=["a", None, "b"]')
        groups: dict[str, tuple[list[int], list[NameLink]]] = {}
        for i, which in enumerate(rows):
            key = repr(which)
            if key not in groups:
                groups[key] = ([], parse(which))
            groups[key][0].append(i)
        return cls([(idx, links) for idx, links in groups.values()], len(rows))

    def expanded(self) -> Plan:
        """Return this plan, allowing blocks of rows (used while generating)."""
        plan = Plan(self.segments, self.size)
        plan.expand = True
        return plan

    def blocks(self) -> Plan:
        """Return this plan, allowing blocks of rows, made once."""
        if self.expand:
            return self
        if self._blocks is None:
            self._blocks = self.expanded()
        return self._blocks

    def uniform(self, slot: Slot) -> Chain | None:
        """Return the one chain for all rows at a slot, or None when rows differ."""
        if self.size is not None:
            return None
        if torch.compiler.is_compiling():
            return slot.chain(self.segments[0][1])
        plan, chain = slot.chained
        if plan is not self:
            chain = slot.chain(self.segments[0][1])
            slot.chained = (self, chain)  # one assignment: another thread sees the old or the new
        return chain

    def split(self, slot: Slot, batch: int, device: torch.device, host: nn.Module) -> list[Part]:
        """Return (rows, chain) for every segment that has ops at this slot."""
        selectors = self.selectors(batch, device, slot.path, type(host).__name__)
        parts = []
        for rows, (_, links) in zip(selectors, self.segments, strict=True):
            chain = slot.chain(links)
            if chain:
                parts.append((rows, chain))
        return parts

    def selectors(self, batch: int, device: torch.device, path: str, kind: str) -> list[slice | Tensor]:
        """Return the rows of each segment in a batch of `batch` rows: slices where they are contiguous."""
        if torch.compiler.is_compiling():
            return self._select(batch, device, path, kind)
        key = (batch, device)
        if key not in self._selectors:
            self._selectors[key] = self._select(batch, device, path, kind)
        return self._selectors[key]

    def mixture(self, batch: int, path: str, kind: str) -> Mixture | None:
        """Return which rows of a batch have which adapter, or None if some have a stack or a sum."""
        if batch not in self._mixtures:
            self._mixtures[batch] = self._mix(batch, path, kind)
        return self._mixtures[batch]

    def _mix(self, batch: int, path: str, kind: str) -> Mixture | None:
        k = self._times(batch, path, kind)
        names: list[str] = []
        weights: list[float | None] = []
        of_each: list[list[int]] = []
        for rows, links in self.segments:
            if not links:
                continue
            if rows is None or len(links) != 1 or len(links[0]) != 1:
                return None
            name, w = links[0][0]
            names.append(name)
            weights.append(None if w is None else float(w))
            of_each.append([i * k + j for i in rows for j in range(k)])
        return Mixture(names, weights, of_each, batch) if names else None

    def check_batch(self, batch: int, path: str, kind: str) -> None:
        """Raise unless a batch of `batch` rows fits.

        Raises:
            PlanError: naming the module `path` (`kind`).
        """
        if self.size is not None:
            self._times(batch, path, kind)

    def _times(self, batch: int, path: str, kind: str) -> int:
        """Return how many rows of the batch each row of the plan stands for."""
        assert self.size is not None
        k, odd = divmod(batch, self.size)
        if odd or (k != 1 and not self.expand):
            raise PlanError(
                f"the plan names {self.size} rows, but this module got {batch}",
                where=f"{path} ({kind})",
                hint="give rows= one entry for each row of the batch; a module that sees flattened or routed tokens cannot tell rows apart",
            )
        return k

    def _select(self, batch: int, device: torch.device, path: str, kind: str) -> list[slice | Tensor]:
        k = self._times(batch, path, kind)
        assert self.size is not None
        out: list[slice | Tensor] = []
        for idx, _ in self.segments:
            rows = idx if idx is not None else list(range(self.size))
            if rows[-1] - rows[0] == len(rows) - 1:
                out.append(slice(rows[0] * k, (rows[-1] + 1) * k))
            else:
                flat = [i * k + j for i in rows for j in range(k)]
                out.append(torch.tensor(flat, dtype=torch.long, device=device))
        return out
