"""Progressive rank: a LoRA that starts small and gains directions while it trains, or loses those that it does not use.

    grow     A <- [A; random], B <- [B, 0]: the output is unchanged at that moment. s stays alpha / r of the starting r, so that the
             directions that are there already are not rescaled. Their optimiser state stays; that of the new ones begins at zero.
    shrink   B A = U S V (in factored form, O((a + b) r^2)); the q strongest directions stay, A = S^1/2 V, B = U S^1/2. Its relative error is
             reported. The directions are new ones, so their optimiser state begins anew.

Growing in rank is akin to ReLoRA (arXiv 2307.05695), which merges instead; shrinking is the truncated SVD (Eckart-Young).
When: at given optimiser steps, when the loss stalls (`patience`, where a transformers Trainer logs a loss), or when `grow` or `shrink` is called.
Cost: that of a LoRA of the present rank. Cannot: change its rank under DistributedDataParallel, which lays out its buckets once.
Choose it when you do not know the rank: start small, grow while it helps, shrink at the end.
"""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.algebra.shorten import balanced, check_rule, enough, factored
from slimtune.core.errors import CapabilityError, SpecError
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.state import Adapter, state_of
from slimtune.core.stepping import Step, logged_losses
from slimtune.core.trained import Trained, set_values, stacks
from slimtune.methods.lora import LoRA, LoRAOp

STARTS = ("kaiming", "gaussian", "orthogonal")  # those that need no frozen copy of a fixed rank


class ProgressiveLoRAOp(Trained, LoRAOp):
    """A [r, a], B [b, r], r changing.

    Attributes:
        stale: what optimisers have to do with their state before the next step: nothing, "grown" or "new" (forget it).
        lost: relative error of all that shrinking has cut away.
    """

    def __init__(self, site: Site, r: int, scale: float, *options: Any, **more: Any) -> None:
        super().__init__(site, r, scale, *options, **more)
        self.stale, self.lost, self.memory = "", 0.0, {}

    def grow(self, by: int, seed: int) -> None:
        """Add `by` directions that change nothing yet."""
        A, B = self._directions(self.A, by), self._directions(self.B, by)
        draw = torch.Generator().manual_seed(seed)
        kept, drawn = (B, A) if self.kind.name != "embedding" else (A, B)
        values = torch.empty(drawn.shape)
        if self.kind.name == "embedding":  # as such a LoRA starts: the row of padding_idx keeps its zero in A
            values.normal_(generator=draw)
        else:
            fan_in = drawn.shape[-1] if self.kind.rank_axis == 1 else drawn[0].numel()
            values.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=draw)
        drawn.copy_(values)
        kept.zero_()
        A, B = self.kind.beside(self.A.detach(), self.B.detach(), A, B)
        self._take(A, B, self.r + by, "grown")

    def shrink(self, r: int | None, energy: float | None) -> float:
        """Keep the strongest directions: `r` of them, or as many as hold this share of |dW|^2; return the relative error."""
        A, B = stacks(self.kind, self.A.detach(), self.B.detach())
        U, S, V = factored(A, B)
        groups = self.groups
        q = max(1, r // groups) if r is not None else enough(S, energy or 1.0)
        if q * groups >= self.r:
            return 0.0
        squares = S.double().square()
        error = float((squares[:, q:].sum() / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        a, b = balanced(U[..., :q], S[:, :q], V[:, :q])
        a = a.masked_fill((A == 0).all(1, keepdim=True), 0.0)  # inputs without effect (padding_idx) stay so to the bit
        self._take(*self.kind.pack(a, b, self.shape), q * groups, "new")
        self.lost = (self.lost**2 + error**2) ** 0.5
        return error

    @property
    def groups(self) -> int:
        """Groups of a convolution: each has its share of the directions."""
        return self.A.shape[0] // self.B.shape[1] if self.kind.rank_axis == 0 else 1

    def _take(self, A: Tensor, B: Tensor, r: int, stale: str) -> None:
        for name, value in (("A", A), ("B", B)):
            if name in self._buffers:
                self._buffers[name] = value.to(self.B)
            else:
                set_values(self._parameters[name], value)  # type: ignore[arg-type]
        self.r, self.stale = r, "new" if "new" in (self.stale, stale) else stale

    def _directions(self, like: Tensor, by: int) -> Tensor:
        """Return an empty tensor for `by` more directions of A or B."""
        shape = list(like.shape)
        axis = self.kind.rank_axis if like is self.A else self.kind.rank_axis + 1
        shape[axis] = by if like is self.A else by // self.groups
        return like.detach().new_empty(shape)

    def freshen(self, optimiser: torch.optim.Optimizer) -> None:
        """Make an optimiser's state fit: moments of grown factors get zeros for what is new; whatever else does not fit begins anew."""
        for name in ("A", "B"):
            p = self._parameters.get(name)
            if p is None or p not in optimiser.state:
                continue
            if self.stale == "new":
                del optimiser.state[p]
                continue
            state = optimiser.state[p]
            grown = {k: self._padded(name, t, p) for k, t in state.items() if isinstance(t, Tensor) and t.numel() > 1}
            if any(t is None for t in grown.values()):
                warnings.warn(f"the state of {type(optimiser).__name__} cannot be extended, so it begins anew for grown factors", stacklevel=2)
                del optimiser.state[p]
            else:
                state.update(grown)
        self.stale = ""

    def _padded(self, name: str, t: Tensor, p: Tensor) -> Tensor | None:
        """Return a moment of A or B with zeros for the new directions, None if it is no such thing."""
        if t.shape == p.shape and t.is_floating_point():
            return t
        axis = self.kind.rank_axis + (name == "B")
        if t.dim() != p.dim() or not t.is_floating_point() or any(n != m for d, (n, m) in enumerate(zip(t.shape, p.shape, strict=True)) if d != axis):
            return None
        new = t.new_zeros([m - n if d == axis else n for d, (n, m) in enumerate(zip(t.shape, p.shape, strict=True))])
        if name == "B":
            return torch.cat([t, new], axis)
        if self.groups == 1:
            return torch.cat([t, new], axis)
        return torch.cat([x.view(self.groups, -1, *x.shape[1:]) for x in (t, new)], 1).flatten(0, 1)  # rows belong to groups in order

    def rank_now(self) -> int:
        return self.r

    def facts(self) -> dict[str, Any]:
        return {"r": self.r, "stale": self.stale, "lost": self.lost}

    def take_facts(self, facts: dict[str, Any]) -> None:
        self.r, self.stale, self.lost = int(facts["r"]), str(facts["stale"]), float(facts["lost"])

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "lost": self.lost}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        if not isinstance(lost := settings.get("lost"), (int, float)):
            raise SpecError(f"these are no settings of a progressive LoRA: {str(settings)[:200]}", where=str(site))
        super().resume({k: v for k, v in settings.items() if k != "lost"}, site)
        self.lost = float(lost)


@register("progressive")
@dataclass(frozen=True, kw_only=True)
class ProgressiveLoRA(LoRA):
    """A LoRA that gains directions while it trains, or loses them.

    Args:
        r: rank at the start; the scale stays that of this rank.
        by: directions that a site gains each time.
        max_r: rank at which growing ends.
        every: optimiser steps between two growths; 0: only when `patience` or `grow` says so.
        patience: also grow when the loss that a transformers Trainer logs has not reached a new low for so many of its entries in a row.
        shrink_at: optimiser step at which all sites are cut down once; 0: never.
        energy: share of |dW|^2 that a site keeps then.
        seed: of the new directions.
        alpha, rank_stabilised, dropout, dropout_kind, freeze, init, up_bias, rank_pattern, alpha_pattern: see `LoRA`.
        targets, layers, exclude, train_modules: see `Spec`.

    Example:
        >>> import slimtune as st
        >>> st.ProgressiveLoRA(r=2, by=2, max_r=8, every=200).max_r
        8
    """

    op = ProgressiveLoRAOp

    r: int = 4
    by: int = 4
    max_r: int = 16
    every: int = 100
    patience: int = 0
    shrink_at: int = 0
    energy: float = 0.99
    seed: int = 0

    def problems(self) -> list[str]:
        wrong = super().problems()
        wrong += [f"{k} must be at least 1, not {getattr(self, k)}" for k in ("by", "max_r") if getattr(self, k) < 1]
        wrong += [f"{k} must not be negative, but is {getattr(self, k)}" for k in ("every", "patience", "shrink_at", "seed") if getattr(self, k) < 0]
        if self.max_r < self.r:
            wrong.append(f"max_r must not be below r, but {self.max_r} < {self.r}")
        if not 0 < self.energy <= 1:
            wrong.append(f"energy must be above 0 and at most 1, not {self.energy}")
        if self.init not in STARTS:
            wrong.append(f"init must be one of {', '.join(STARTS)} for a rank that changes, not {self.init!r}")
        return wrong

    def check(self, site: Site) -> list[str]:
        wrong = super().check(site)
        return wrong or site.kind.rank_problems(site.module, site.param, self.rank(site) + self.by)

    # ---- optimiser steps ----------------------------------------------------------------------------------------
    def before_step(self, step: Step) -> None:
        """Bring the optimiser's state up to ranks that were changed by hand."""
        changes = self.every or self.patience or self.shrink_at
        if changes and torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise CapabilityError(
                "a rank cannot change while several processes train: DistributedDataParallel lays out its buckets once",
                where=f"adapter {step.adapter.name!r} (method {self.method})",
                hint="train on one process, or use AdaLoRA, whose tensors keep their shapes",
            )
        freshen(step)

    def after_step(self, step: Step) -> None:
        """Grow or shrink if it is time to."""
        n = step.number
        if self.shrink_at and n == self.shrink_at:
            for op in _own(step):
                op.shrink(None, self.energy)
        elif (self.every and n % self.every == 0) or (self.patience and self.stalled(step)):
            grow_ops(dict(step.ops), self.by, self.max_r, self.seed)
        freshen(step)

    def stalled(self, step: Step) -> bool:
        """Tell whether the logged loss has not reached a new low for `patience` entries; the count begins anew with each growth.

        Raises:
            SpecError: no Trainer is stepping, so no loss is to be seen.
        """
        losses = logged_losses()
        if losses is None:
            hint = "in a loop of your own look at the loss there: slimtune.methods.progressive.grow(model)"
            raise SpecError("patience= reads the loss that a transformers Trainer logs, but none is running", where=step.adapter.name, hint=hint)
        seen = next(iter(step.ops.values()))
        assert isinstance(seen, ProgressiveLoRAOp)
        began = int(seen.memory.get("losses", torch.zeros(())))
        since = losses[began:]
        if len(since) <= self.patience or min(since[-self.patience :]) < min(since[: -self.patience]):
            return False
        seen.memory["losses"] = torch.tensor(len(losses))
        return True

    def remarks(self, adapter: Adapter) -> list[str]:
        """Return what a report should say about what was cut away."""
        lost = [op.lost for op in adapter.ops.values() if isinstance(op, ProgressiveLoRAOp) and op.lost]
        return [f"shrunk by SVD: relative error of dW at most {max(lost):.2e}"] if lost else []


def freshen(step: Step) -> None:
    """Bring an optimiser's state up to the ranks."""
    for op in _own(step):
        if op.stale:
            op.freshen(step.optimiser)


def _own(step: Step) -> list[ProgressiveLoRAOp]:
    return [op for op in step.ops.values() if isinstance(op, ProgressiveLoRAOp)]


def grow_ops(ops: dict[Any, Any], by: int, max_r: int | None, seed: int) -> None:
    """Let ops gain directions."""
    for at, op in ops.items():
        room = by if max_r is None else min(by, max_r - op.r)
        room -= room % op.groups
        if room > 0:
            op.grow(room, zlib.crc32(f"{seed}|{at}|{op.r}".encode()))


# ---- by hand ----------------------------------------------------------------------------------------------------------
def grow(model: nn.Module, name: str = "default", *, by: int) -> None:
    """Let every site of a progressive adapter gain directions now; the output does not change.

    Args:
        model: a model with a ProgressiveLoRA.
        name: of the adapter.
        by: how many directions.

    Raises:
        NoSuchAdapter, SpecError: no such adapter; it is of another method, or `by` is no positive number.

    Example:
        >>> from slimtune.methods.progressive import grow
        >>> grow(model, "support", by=4)  # doctest: +SKIP
    """
    adapter, ops = _progressive(model, name)
    if type(by) is not int or by < 1:
        raise SpecError(f"by must be an integer of at least 1, not {by!r}", hint="by=4")
    wrong = [f"{at[0]}: {by} is no multiple of its {op.groups} groups" for at, op in ops.items() if by % op.groups]
    if wrong:
        raise SpecError("; ".join(wrong[:4]), where=wrong[0].split(": ")[0], hint="each group of a convolution gains the same number")
    with torch.no_grad():
        grow_ops(ops, by, None, adapter.spec.seed)  # type: ignore[attr-defined]


def shrink(model: nn.Module, name: str = "default", *, r: int | None = None, energy: float | None = None) -> dict[str, float]:
    """Cut every site of a progressive adapter down to its strongest directions now.

    Args:
        model: a model with a ProgressiveLoRA.
        name: of the adapter.
        r: directions that a site keeps.
        energy: instead of r: the share of |dW|^2 that it keeps.

    Returns:
        module path -> relative error of dW in the Frobenius norm.

    Raises:
        NoSuchAdapter, SpecError: no such adapter; it is of another method, or the rule makes no sense.

    Example:
        >>> from slimtune.methods.progressive import shrink
        >>> shrink(model, "support", energy=0.99)  # doctest: +SKIP
    """
    check_rule(r, energy)
    if r is None and energy is None:
        raise SpecError("shrink needs r= or energy=", hint="energy=0.99")
    _, ops = _progressive(model, name)
    with torch.no_grad():
        return {at[0] if at[1] == "weight" else ".".join(at): op.shrink(r, energy) for at, op in ops.items()}


def _progressive(model: nn.Module, name: str) -> tuple[Adapter, dict[tuple[str, str], ProgressiveLoRAOp]]:
    adapter = state_of(model).adapter(name)
    ops = {at: op for at, op in adapter.ops.items() if isinstance(op, ProgressiveLoRAOp)}
    if not ops:
        raise SpecError(f"{name!r} has a fixed rank", where=f"method {adapter.spec.method}", hint="attach st.ProgressiveLoRA(...) instead")
    return adapter, ops


__all__ = ["ProgressiveLoRA", "ProgressiveLoRAOp", "grow", "shrink"]
