"""AdaLoRA: dW = s P diag(l) Q, a LoRA in the form of an SVD whose rank is shared out among all sites while it trains.

Paper: arXiv 2303.10512. Keys as in the reference library: A = Q [r, a], E = l [r, 1], B = P [b, r]; s = alpha / (init_r + 1e-5), also after
pruning. At each optimiser step t (from 1), by itself, in any training loop:

    before   the gradient of gamma mean(|A A^T - I|, |B^T B - I|), Frobenius norms over all A and B, is added: P and Q stay near orthonormal.
             The loss that is logged does not have this term, and clipping has happened before it.
    after    I = |w dL/dw|;  S <- b1 S + (1 - b1) I;  U <- b2 U + (1 - b2) |I - S|;  s(w) = S U           (eq. 8 to 10)
             a triplet scores s(l_i) + mean_j s(Q_ij) + mean_j s(P_ji)                                    (eq. 7)
             every `delta_t` steps only the budget's best triplets of all sites together keep their l, the others' become 0 (and may come back):
             all at t <= t_init; target + (all - target) (1 - (t - t_init) / (total - t_final - t_init))^3; target from total - t_final on (eq. 12)

From then on the choice is settled. A file holds only the triplets that are left.
Cost: LoRA's of rank init_r, and while the budget falls two numbers for each parameter. Cannot: learn `total_steps` in a hand-written loop.
Under data-parallel training all processes prune alike: their gradients are the same.
Choose it when parameters are scarce and you do not know which layers need rank: it moves rank to where the gradients ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.core.stepping import Step, planned_steps
from slimtune.core.trained import Trained, stacks
from slimtune.methods.lora import LoRAOp

EPSILON = 1e-5  # the reference adds it to the rank that it divides by


class AdaLoRAOp(Trained, LoRAOp):
    """A [r, a], E [r, 1] and B [b, r] (experts: A [n, r, a], E [n, r, 1], B [n, b, r]).

    Attributes:
        chosen: which triplets the last choice has kept, in E's shape.
        kept: of a loaded op: where its r triplets stood among the `full` ones it was trained with.
    """

    roles = {"A": "down", "E": "gain", "B": "up"}
    chosen: Tensor

    def __init__(self, site: Site, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, r, scale, dropout)
        lead = self.A.shape[: self.kind.rank_axis + 1]
        self.E = nn.Parameter(torch.zeros(*lead, 1, device=site.device, dtype=site.dtype))
        self.full, self.kept = r, list(range(r))
        self.register_buffer("chosen", torch.ones(self.E.shape, dtype=torch.bool, device=site.device), persistent=False)
        self.memory = {}

    def factors(self, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        A = self.A * self.E.view(*self.E.shape[:-1], *[1] * (self.A.dim() - self.E.dim() + 1))  # diag(l) Q
        return (A * keep if isinstance(keep, Tensor) else A), self.B

    def low_rank(self) -> tuple[Tensor, Tensor, float, float] | None:
        return super().low_rank() if self.E.numel() else None

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return super().run(x, y, host) if self.E.numel() else torch.zeros_like(y)

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        return super().add(x, y, host, w) if self.E.numel() else y

    # ---- training -----------------------------------------------------------------------------------------------
    def add_penalty(self, weight: float) -> None:
        """Add the gradient of weight * (|A A^T - I| + |B^T B - I|)."""
        A, B = stacks(self.kind, self.A, self.B)
        for p, rows, back in ((self.A, A, lambda g: g), (self.B, B.mT, lambda g: g.mT)):
            if p.grad is None:  # it had no part in this step
                continue
            M = rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)  # [G, q, q]
            size = M.norm(dim=(1, 2), keepdim=True)
            p.grad.add_(back(2.0 * weight * (M @ rows) / size.clamp_min(torch.finfo(M.dtype).tiny)).reshape(p.shape))

    def observe(self, beta1: float, beta2: float) -> None:
        """Take this step's sensitivities into the smoothed ones and their uncertainty."""
        for name, p in self.named_parameters():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            S, U = (self.memory.get(f"{name}.{k}", torch.zeros_like(p)) for k in ("sensitivity", "uncertainty"))
            S = self.memory[f"{name}.sensitivity"] = beta1 * S.to(p.device) + (1 - beta1) * now
            self.memory[f"{name}.uncertainty"] = beta2 * U.to(p.device) + (1 - beta2) * (now - S).abs()

    def scores(self) -> Tensor:
        """Return the importance of every triplet, [triplets]."""
        s = {n: self.memory[f"{n}.sensitivity"] * self.memory[f"{n}.uncertainty"] for n in ("A", "E", "B")}
        A, B = stacks(self.kind, s["A"], s["B"])
        return s["E"].flatten() + torch.stack([A.mean(2).flatten(), B.mean(1).flatten()], 1).sum(1)

    def prune(self) -> None:
        """Take the triplets away that the last choice has left out."""
        self.E.masked_fill_(~self.chosen, 0.0)

    def alive(self) -> Tensor:
        """Return which triplets act: those chosen last, and those that have come back since. In E's shape."""
        return self.chosen | (self.E != 0)

    def triplets_alive(self) -> int:
        """Return how many triplets act; of a model without weights, all."""
        return self.E.numel() if self.E.is_meta else int(self.alive().sum())

    def rank_now(self) -> int:
        """Return how many triplets act (of experts: the mean over them, rounded)."""
        alive = self.triplets_alive()
        return round(alive / self.E.shape[0]) if self.kind.rank_axis == 1 and self.E.numel() else alive

    def facts(self) -> dict[str, Any]:
        return {"full": self.full, "kept": self.kept}

    def take_facts(self, facts: dict[str, Any]) -> None:
        self.full, self.kept, self.r = int(facts["full"]), [int(i) for i in facts["kept"]], len(facts["kept"])

    # ---- files --------------------------------------------------------------------------------------------------
    def rows(self) -> list[bool]:
        """Return which of the `full` triplets a file holds: those that act, or all where they belong to several matrices."""
        alive = self.alive().flatten().tolist() if self.shortens else [True] * self.r
        of_full = [False] * self.full
        for at, on in zip(self.kept, alive, strict=True):
            of_full[at] = on
        return of_full

    @property
    def shortens(self) -> bool:
        """Whether a triplet can be left out: it is one of a single matrix."""
        return self.kind.rank_axis == 0 and self.A.shape[0] == self.B.shape[1]

    def settings(self) -> dict[str, Any]:
        chosen = None if self.shortens else bits(self.alive().flatten().tolist())
        return {"scale": self.scale, "rows": bits(self.rows()), "chosen": chosen}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        scale, rows, chosen = (settings.get(k) for k in ("scale", "rows", "chosen"))
        fine = all(isinstance(v, str) and 0 < len(v) < 2**24 and set(v) <= {"0", "1"} for v in (rows, chosen or "1")) and len(settings) == 3
        if not fine or isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise SpecError(f"these are no settings of an AdaLoRA: {str(settings)[:200]}", where=str(site))
        assert isinstance(rows, str)
        self.full, self.kept, self.scale = len(rows), [i for i, on in enumerate(rows) if on == "1"], float(scale)
        self.r = len(self.kept)
        shape_a, shape_b = site.kind.factor_shapes(site.module, site.param, self.r)
        new: dict[str, Any] = {"device": self.A.device, "dtype": self.A.dtype}
        self.A, self.B = nn.Parameter(torch.empty(shape_a, **new)), nn.Parameter(torch.empty(shape_b, **new))
        self.E = nn.Parameter(torch.empty(*shape_a[: self.kind.rank_axis + 1], 1, **new))
        self.chosen = torch.ones(self.E.shape, dtype=torch.bool, device=self.E.device)
        if chosen is not None:
            if len(chosen) != self.E.numel():
                raise SpecError(f"{len(chosen)} flags for {self.E.numel()} triplets", where=str(site))
            self.chosen = torch.tensor([c == "1" for c in chosen], device=self.E.device).view(self.E.shape)

    def export(self, module: nn.Module) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {"A": self.A, "B": self.B, "E": self.E}
        alive = self.alive().flatten()
        if not self.shortens or bool(alive.all()):
            return held
        return {"A": self.A[alive], "B": self.B[:, alive], "E": self.E[alive]}

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"A": tuple(self.A.shape), "B": tuple(self.B.shape), "E": tuple(self.E.shape)}


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Spec):
    """Adaptive budget allocation (arXiv 2303.10512): the sites that need it get more rank, by themselves, in any training loop.

    Args:
        init_r: rank of every site at the start.
        target_r: average rank of the sites at the end.
        alpha: the scale is alpha / init_r; default: 2 init_r.
        dropout: probability of dropping an input while training.
        t_init: optimiser steps before the first triplet goes; a float below 1 is a share of all steps.
        t_final: optimiser steps after the last one has gone, likewise.
        delta_t: steps between two choices.
        beta1, beta2: memory of the smoothed sensitivity and of its uncertainty.
        orthogonality: gamma, the weight of the penalty.
        total_steps: optimiser steps of the whole training; None: a transformers Trainer (TRL's and `slimtune train` too) is asked by
            itself, any other loop must give it.
        targets, layers, exclude, train_modules: see `Spec`.

    Example:
        >>> import slimtune as st
        >>> st.AdaLoRA(init_r=12, target_r=8, total_steps=1000).budget(300, 1000, 120, 80)
        88
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    t_init: int | float = 0.1
    t_final: int | float = 0.4
    delta_t: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    total_steps: int | None = None

    def problems(self) -> list[str]:
        counts = {k: getattr(self, k) for k in ("init_r", "target_r", "delta_t", "total_steps")}
        wrong = [f"{k} must be at least 1, not {v}" for k, v in counts.items() if v is not None and v < 1]
        if self.target_r > self.init_r:
            wrong.append(f"target_r must not be above init_r, but {self.target_r} > {self.init_r}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), not {self.dropout}")
        wrong += [f"{k} must be in (0, 1), not {v}" for k in ("beta1", "beta2") if not 0 < (v := getattr(self, k)) < 1]
        if self.orthogonality < 0:
            wrong.append(f"orthogonality must not be negative, but is {self.orthogonality}")
        for k in ("t_init", "t_final"):
            v = getattr(self, k)
            if v < 0 or (isinstance(v, float) and v >= 1):
                wrong.append(f"{k} must be a number of steps or a share in [0, 1), not {v}")
        if not wrong and self.total_steps is not None:
            wrong += self.no_time(self.total_steps)
        return wrong

    def check(self, site: Site) -> list[str]:
        wrong = site.kind.rank_problems(site.module, site.param, self.init_r)
        if self.dropout and not site.kind.drops:
            wrong.append(f"the input of {site.kind.noun} cannot be dropped: set dropout=0 or leave it out with exclude=")
        return wrong

    def build(self, site: Site) -> AdaLoRAOp:
        alpha = 2.0 * self.init_r if self.alpha is None else float(self.alpha)
        op = AdaLoRAOp(site, self.init_r, alpha / (self.init_r + EPSILON), self.dropout)
        if not site.blank:
            with torch.no_grad():
                A, B = stacks(op.kind, op.A, op.B)
                nn.init.normal_(op.A, std=A.shape[2] ** -0.5)  # rows and columns of norm 1 on average, as the penalty wants them at any width
                nn.init.normal_(op.B, std=B.shape[1] ** -0.5)  # (the reference's 0.02 gives that at a width of 2500)
                pad = site.module.__dict__.get("padding_idx") if site.kind.name == "embedding" else None
                if pad is not None:
                    op.A[:, pad] = 0
        return op

    # ---- the schedule -------------------------------------------------------------------------------------------
    def times(self, total: int) -> tuple[int, int]:
        """Return (t_init, t_final) in steps."""
        first, last = (round(v * total) if isinstance(v, float) else v for v in (self.t_init, self.t_final))
        return first, last

    def no_time(self, total: int) -> list[str]:
        """Return the problem that the schedule leaves no step to prune in, if it does not."""
        first, last = self.times(total)
        return [] if first + last < total else [f"t_init={first} and t_final={last} leave none of total_steps={total} for the budget to fall"]

    def budget(self, step: int, total: int, at_first: int, at_last: int) -> int:
        """Return how many triplets may act after a step.

        Args:
            step: from 1.
            total: steps of the whole training.
            at_first, at_last: triplets at the start and at the end.
        """
        first, last = self.times(total)
        if step <= first:
            return at_first
        if step >= total - last:
            return at_last
        left = 1 - (step - first) / (total - last - first)
        return int((at_first - at_last) * left**3 + at_last)

    def scheduled(self, steps: int) -> AdaLoRA:
        """Return this spec for training of so many optimiser steps, unless it says how many itself."""
        return self if self.total_steps is not None else replace(self, total_steps=steps)

    def total(self, adapter: Adapter) -> int:
        """Return the length of training.

        Raises:
            SpecError: nobody knows it, or it leaves no time to prune.
        """
        total = self.total_steps or adapter.total_steps or planned_steps(adapter)
        where = f"adapter {adapter.name!r} (method {self.method})"
        if total is None:
            hint = "st.AdaLoRA(total_steps=...): batches * epochs / accumulation; only a transformers Trainer is asked by itself"
            raise SpecError("its budget falls over the length of training, which is not known here", where=where, hint=hint)
        if wrong := self.no_time(total):
            raise SpecError(wrong[0], where=where, hint="train longer, or lower t_init and t_final")
        adapter.total_steps = total
        return total

    # ---- optimiser steps ----------------------------------------------------------------------------------------
    def before_step(self, step: Step) -> None:
        """Make sure that the schedule is known, and add the penalty's gradient."""
        self.total(step.adapter)
        ops = _own(step)
        count = sum(2 * matrices(op) for op in ops)
        for op in ops if self.orthogonality else []:
            op.add_penalty(step.scale * self.orthogonality / count)

    def after_step(self, step: Step) -> None:
        """Weigh the triplets, and prune if it is time to."""
        total, ops = self.total(step.adapter), _own(step)
        first, last = self.times(total)
        settled = total - last
        if step.number < settled:
            for op in ops:
                op.observe(self.beta1, self.beta2)
            if step.number > first and step.number % self.delta_t == 0:
                self.choose(ops, self.budget(step.number, total, *ends(self, ops)))
        else:
            if step.number == settled and all(op.memory for op in ops):
                self.choose(ops, ends(self, ops)[1])
            for op in ops:
                op.memory = {}
                op.prune()

    def choose(self, ops: list[AdaLoRAOp], budget: int) -> None:
        """Keep the best triplets of all sites."""
        scores = torch.cat([op.scores().to(ops[0].E.device) for op in ops])
        best = torch.zeros_like(scores, dtype=torch.bool)
        best[scores.sort(descending=True, stable=True).indices[:budget]] = True
        for op, keep in zip(ops, best.split([op.E.numel() for op in ops]), strict=True):
            op.chosen = keep.view(op.E.shape).to(op.E.device)
            op.prune()

    def remarks(self, adapter: Adapter) -> list[str]:
        """Return what a report should say about the ranks."""
        ops = [op for op in adapter.ops.values() if isinstance(op, AdaLoRAOp)]
        now, (at_first, at_last) = sum(op.triplets_alive() for op in ops), ends(self, ops)
        of = f" of {adapter.total_steps}" if adapter.total_steps else ""
        return [f"{now} of {at_first} triplets act after optimiser step {adapter.steps}{of}; {at_last} will be left at the end"]


def _own(step: Step) -> list[AdaLoRAOp]:
    return [op for op in step.ops.values() if isinstance(op, AdaLoRAOp)]


def bits(flags: list[bool]) -> str:
    """Return flags as text: "1101"."""
    return "".join("01"[on] for on in flags)


def matrices(op: AdaLoRAOp) -> int:
    """Return how many matrices of rank r an op has: one for each expert."""
    return op.E.shape[0] if op.kind.rank_axis == 1 else 1


def ends(spec: AdaLoRA, ops: list[AdaLoRAOp]) -> tuple[int, int]:
    """Return how many triplets ops have at the start and at the end of training."""
    return sum(op.full * matrices(op) for op in ops), sum(spec.target_r * matrices(op) for op in ops)


__all__ = ["AdaLoRA", "AdaLoRAOp", "ends"]
