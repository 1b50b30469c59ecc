"""Delta-LoRA: a LoRA whose steps also move the base's weight: W' = W + s B A + lambda s (B A - B_k A_k), the last term without gradient.

Paper: arXiv 2309.02411, algorithm 1: from some step on, W <- W + lambda s (B' A' - B A) after each optimiser step. These updates add up to
lambda s (B A - B_k A_k), with the factors B_k, A_k of the step they began at: so the base keeps its bits, several adapters can be trained on
it, and a file holds four factors instead of a changed model. There is no dropout (section 4.2: it would make the two gradients differ).

With u = B + lambda [B] and v = (A + lambda [A]) / (1 + lambda), where [.] gets no gradient, u v = (1 + lambda) B A, while its gradients are those
of B A alone; so the forward is one low-rank product of rank 2 r (r, if B_k A_k = 0).

Cost: LoRA's parameters; 4 n r (a + b) FLOPs forward, 2 r (a + b) more numbers kept. Cannot: drop inputs.
Choose it when a LoRA that you can afford learns too little: each of its steps moves the base as well (the sum still has rank 2 r at most).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimtune.core.errors import SpecError
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.state import Adapter
from slimtune.core.stepping import Step
from slimtune.core.trained import Trained
from slimtune.methods.lora import LoRA, LoRAOp


class DeltaLoRAOp(Trained, LoRAOp):
    """A [r, a], B [b, r], and from the start of the delta on their values then, `Ak` and `Bk` (None where their product was 0).

    Attributes:
        ratio: lambda.
        started: whether the delta counts.
    """

    def __init__(self, site: Site, r: int, scale: float, *options: Any, **more: Any) -> None:
        super().__init__(site, r, scale, *options, **more)
        self.ratio, self.started = 0.0, False
        self.register_buffer("Ak", None)
        self.register_buffer("Bk", None)
        self.memory = {}
        self._held: tuple[Tensor, Tensor] | None = None

    def start(self) -> None:
        """Let the delta count from the present factors on."""
        self.started = True
        if bool(self.A.any()) and bool(self.B.any()):
            self.Ak, self.Bk = self.A.detach().clone(), self.B.detach().clone()

    def factors(self, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        if not self.started:
            return super().factors(keep)
        A, B = self._held or (self.A.detach(), self.B.detach())
        A, B = (self.A + self.ratio * A) / (1 + self.ratio), self.B + self.ratio * B
        if self.Ak is not None:
            A, B = self.kind.beside(A, B, self.Ak, -self.ratio * self.Bk)
        if self.A0 is not None:
            A, B = self.kind.beside(A, B, self.A0, -self.B0)
        return A, B

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep what gets no gradient as it is now."""
        self._held = self.A.detach().clone(), self.B.detach().clone()
        try:
            yield
        finally:
            self._held = None

    # ---- training and files -------------------------------------------------------------------------------------
    def facts(self) -> dict[str, Any]:
        return {"started": self.started}

    def take_facts(self, facts: dict[str, Any]) -> None:
        self.started = bool(facts["started"])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "ratio": self.ratio, "started": self.started, "snapshot": self.Ak is not None}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        own = {k: settings.get(k) for k in ("ratio", "started", "snapshot")}
        ratio, started, snapshot = own.values()
        if not isinstance(ratio, (int, float)) or type(started) is not bool or type(snapshot) is not bool or ratio <= 0:
            raise SpecError(f"these are no settings of a Delta-LoRA: {str(settings)[:200]}", where=str(site))
        super().resume({k: v for k, v in settings.items() if k not in own}, site)
        self.ratio, self.started = float(ratio), started
        for name, like in (("Ak", self.A), ("Bk", self.B)):
            self._buffers[name] = torch.empty_like(like) if snapshot else None


@register("delta_lora")
@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """A LoRA whose steps also move the base's weight (arXiv 2309.02411), at no cost in gradients and without touching the base.

    Args:
        ratio: lambda, how far W moves for each step of s B A.
        start: optimiser steps of plain LoRA before W begins to move (the paper's K is one less).
        r, alpha, rank_stabilised, freeze, init, rank_pattern, alpha_pattern, loftq_source: see `LoRA`.
        targets, layers, exclude, train_modules: see `Spec`.

    Example:
        >>> import slimtune as st
        >>> st.DeltaLoRA(r=8, ratio=0.5, start=100).ratio
        0.5
    """

    op = DeltaLoRAOp

    ratio: float = 0.5
    start: int = 100

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.ratio <= 0:
            wrong.append(f"ratio must be above 0, not {self.ratio}")
        if self.start < 0:
            wrong.append(f"start must not be negative, but is {self.start}")
        if self.dropout:
            wrong.append("dropout must be 0: the steps of A and B would not be those of W")
        if self.up_bias:
            wrong.append("up_bias must be False: W has no place for a bias")
        return wrong

    def build(self, site: Site) -> DeltaLoRAOp:
        op = super().build(site)
        assert isinstance(op, DeltaLoRAOp)
        op.ratio = self.ratio
        if self.start == 0 and not site.blank:
            op.start()
        return op

    def after_step(self, step: Step) -> None:
        """Take the snapshot."""
        if step.number >= self.start:
            for op in step.ops.values():
                if isinstance(op, DeltaLoRAOp) and not op.started:
                    op.start()

    def remarks(self, adapter: Adapter) -> list[str]:
        """Return what a report should say about the delta."""
        if all(op.started for op in adapter.ops.values() if isinstance(op, DeltaLoRAOp)):
            return []
        return [f"plain LoRA so far (optimiser step {adapter.steps}): W moves with it from step {self.start} on"]
