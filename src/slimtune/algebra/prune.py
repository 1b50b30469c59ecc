"""Merging task vectors element by element: TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), magnitude pruning.

A task vector is what an adapter changes: one weight's dW (one expert's, for experts), or one trained tensor counted from its neutral value
where the method's change is linear in it (as TIES does for IA3). Each is pruned on its own:

    trim        keep the `density` n entries of largest magnitude                    TIES step 1; magnitude_prune
    drop        keep each entry with probability `density`, divided by `density`     DARE
    elect       sign of the sum over the task vectors (or of the sum of their signs)  TIES step 2; a negative weight turns its vector round first
    join        sum of w_t t over the vectors that agree with the elected sign, divided by how many do      TIES step 3

With all weights equal to lambda this is the papers' lambda times the merged vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HOWS = {"ties": ("trim", True), "dare_ties": ("drop", True), "dare_linear": ("drop", False), "magnitude_prune": ("trim", False)}
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Pruning:
    """How to merge.

    Args:
        how: one of `HOWS`.
        density: share of entries that stay, in (0, 1].
        majority: "total": the sign of the sum; "frequency": the sign of most entries.
        seed: of DARE's draws; each adapter and tensor has its own stream, whatever the order.
    """

    how: str
    density: float
    majority: str = "total"
    seed: int = 0

    def __call__(self, vectors: Sequence[tuple[Tensor, float, str]]) -> Tensor:
        """Merge task vectors of one shape.

        Args:
            vectors: (task vector, weight, what it is: names its random stream).
        """
        thin, electing = HOWS[self.how]
        kept = [(self._trim(t) if thin == "trim" else self._drop(t, label), w) for t, w, label in vectors]
        if not electing:
            return torch.stack([w * t for t, w in kept]).sum(0)
        turned = torch.stack([-t if w < 0 else t for t, w in kept])
        mass = turned.sum(0) if self.majority == "total" else turned.sign().sum(0)
        elected = torch.where(mass >= 0, 1.0, -1.0).to(turned.dtype)
        agrees = turned.sign() == elected
        size = turned.new_tensor([abs(w) for _, w in kept]).view(-1, *[1] * (turned.dim() - 1))
        return (turned * size * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _trim(self, t: Tensor) -> Tensor:
        if self.density == 1:
            return t
        flat = t.flatten()
        top = flat.abs().topk(max(1, round(self.density * flat.numel())), sorted=False).indices
        return torch.zeros_like(flat).index_copy_(0, top, flat[top]).view_as(t)

    def _drop(self, t: Tensor, label: str) -> Tensor:
        if self.density == 1:
            return t
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {label}".encode()).digest()[:8], "big") >> 1
        drawn = torch.rand(t.shape, generator=torch.Generator().manual_seed(number)).to(t.device)  # on the CPU: the same on every device
        return torch.where(drawn < self.density, t / self.density, 0)
