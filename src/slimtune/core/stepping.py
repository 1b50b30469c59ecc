"""Methods that act while they train: one pair of hooks on every torch optimiser of the process calls them, in any training loop.

A spec acts if it has one of

    before_step(step)    gradients are complete (averaged, clipped) and may be changed; nothing has moved yet
    after_step(step)     the optimiser has moved the parameters; gradients are still there

What counts is a step of a torch optimiser (any subclass, wrapped by accelerate or not) that holds the trained parameters of an adapter, at
least one of them with a gradient. So accumulation counts once, an adapter that is switched off or got no gradient stands still, and a step
that GradScaler skips is none. With a closure, `before_step` follows each of its evaluations. The count is `Adapter.steps`; what a method
keeps between steps lies in its ops, so that copies, files and checkpoints have it.

In data-parallel training gradients are averaged before the step, so every process decides the same from the same numbers; methods that draw
random numbers draw them from seeds. Parameters that are sharded over processes are refused.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, SpecError

if TYPE_CHECKING:
    from slimtune.core.op import Op
    from slimtune.core.spec import Spec
    from slimtune.core.state import Adapter

Optimiser = torch.optim.Optimizer


@dataclass(frozen=True)
class Step:
    """One optimiser step of one adapter, as its method sees it.

    Attributes:
        adapter: whose parameters move.
        ops: those that the acting spec has built: (module path, key) -> op.
        optimiser: that moves them.
        number: of this step in the adapter's life, from 1.
        scale: what gradients are multiplied with before the step (by GradScaler, where the optimiser itself takes it out again).
    """

    adapter: Adapter
    ops: dict[tuple[str, str], Op]
    optimiser: Optimiser
    number: int
    scale: float = 1.0


def acts(spec: Spec) -> bool:
    """Tell whether a spec acts at optimiser steps."""
    return hasattr(spec, "before_step") or hasattr(spec, "after_step")


def acting(adapter: Adapter) -> list[tuple[Any, dict[tuple[str, str], Op]]]:
    """Return (spec, its ops) of every part of an adapter that acts at optimiser steps."""
    found = []
    for i, part in enumerate(adapter.spec.parts()):
        if acts(part):
            ops = {at: op for at, op in adapter.ops.items() if op.part == i or (op.part is None and op.method == part.method)}
            found.append((part, ops))
    return found


# ---- who is watched ---------------------------------------------------------------------------------------------------
_WATCHED: weakref.WeakValueDictionary[int, Adapter] = weakref.WeakValueDictionary()  # in the order of attaching, on every process
_NUMBERS = itertools.count()
_LOCK = threading.Lock()
_HOOKED: list[Any] = []


def watch(adapter: Adapter) -> None:
    """Call the acting specs of an adapter at each of its optimiser steps, as long as it lives; does nothing where none acts."""
    if not any(acts(part) for part in adapter.spec.parts()):
        return
    with _LOCK:
        if not _HOOKED:
            from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

            _HOOKED.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])
        if not any(known is adapter for known in _WATCHED.values()):
            _WATCHED[next(_NUMBERS)] = adapter


def unwatch(adapter: Adapter) -> None:
    """Stop calling an adapter's specs."""
    for number in [n for n, known in _WATCHED.items() if known is adapter]:
        del _WATCHED[number]


# ---- the hooks --------------------------------------------------------------------------------------------------------
class _Open(threading.local):
    """The optimiser steps under way in this thread: (optimiser, what was begun for it)."""

    def __init__(self) -> None:
        self.stack: list[tuple[weakref.ref[Optimiser], list[tuple[Any, Step]]]] = []


_OPEN = _Open()


def _before(optimiser: Optimiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not _WATCHED or _nested(optimiser):
        return None
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _OPEN.stack.append((weakref.ref(optimiser), _begin(optimiser)))
        return None
    begun: list[tuple[Any, Step]] = []
    evaluate = closure

    def evaluated() -> Any:
        loss = evaluate()
        begun[:] = _begin(optimiser)
        return loss

    _OPEN.stack.append((weakref.ref(optimiser), begun))
    return ((args[0], evaluated, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluated})


def _after(optimiser: Optimiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _OPEN.stack or _OPEN.stack[-1][0]() is not optimiser:
        return
    _, begun = _OPEN.stack.pop()
    for adapter in {id(step.adapter): step.adapter for _, step in begun}.values():
        adapter.steps += 1
    with torch.no_grad():
        for part, step in begun:
            if hasattr(part, "after_step"):
                part.after_step(step)


def _begin(optimiser: Optimiser) -> list[tuple[Any, Step]]:
    """Find whose step this is, and tell them."""
    infinite = optimiser.__dict__.get("found_inf")  # GradScaler calls a fused optimiser even where nothing will move
    if infinite is not None and bool(infinite):
        return []
    scale = optimiser.__dict__.get("grad_scale")
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    begun = []
    for adapter in list(_WATCHED.values()):
        for part, ops in acting(adapter) if adapter.live else []:
            trained = [p for op in ops.values() for p in op.parameters() if p.requires_grad and p.grad is not None]
            mine = [p for p in trained if id(p) in held]
            if not mine:
                continue
            where = f"adapter {adapter.name!r} (method {part.method})"
            if len(mine) < len(trained):
                raise SpecError(
                    f"{len(trained) - len(mine)} of its {len(trained)} parameters with a gradient are not in this {type(optimiser).__name__}",
                    where=where,
                    hint="a method that acts at optimiser steps needs one optimiser for all: give it st.param_groups(model, lr=...)",
                )
            if any(hasattr(p, "placements") for p in mine):
                raise CapabilityError(
                    "its parameters are sharded over processes, and it decides from whole ones", where=where, hint="train it under DDP"
                )
            begun.append((part, Step(adapter, ops, optimiser, adapter.steps + 1, 1.0 if scale is None else float(scale))))
    with torch.no_grad():
        for part, step in begun:
            disarm(step.adapter)
            if hasattr(part, "before_step"):
                part.before_step(step)
    return begun


def _nested(optimiser: Optimiser) -> bool:
    """Tell whether an optimiser's step runs inside that of another, which has been noticed already (SAM, Lookahead, ZeRO)."""
    stack = _OPEN.stack
    while stack and not _running(stack[-1][0](), optimiser):
        stack.pop()  # its step was left by an error
    return bool(stack)


def _running(outer: Optimiser | None, inner: Optimiser) -> bool:
    frame = sys._getframe() if outer is not None and outer is not inner else None
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is outer:
            return True
        frame = frame.f_back
    return False


# ---- who trains -------------------------------------------------------------------------------------------------------
_TRAINERS: ContextVar[tuple[Any, ...]] = ContextVar("slimtune_trainers", default=())


@contextlib.contextmanager
def training_with(trainer: Any) -> Iterator[None]:
    """Say that a transformers Trainer trains in this block (`integrations.trainer` does)."""
    token = _TRAINERS.set((*_TRAINERS.get(), trainer))
    try:
        yield
    finally:
        _TRAINERS.reset(token)


def planned_steps(adapter: Adapter) -> int | None:
    """Return how many steps an adapter will have made when the transformers Trainer that trains it now is done, None without one.

    A schedule needs the end of training, which an optimiser does not know, and the Trainer does.
    """
    trainer = _trainer()
    return None if trainer is None else int(adapter.steps + trainer.state.max_steps - trainer.state.global_step)


def logged_losses() -> list[float] | None:
    """Return the training losses that the transformers Trainer which trains now has logged so far, None without one."""
    trainer = _trainer()
    return None if trainer is None else [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def _trainer() -> Any:
    return next((trainer for trainer in reversed(_TRAINERS.get()) if trainer.state.max_steps > 0), None)


# ---- training that no hook sees ---------------------------------------------------------------------------------------
_GUARDS: weakref.WeakKeyDictionary[Adapter, Any] = weakref.WeakKeyDictionary()


def arm(adapter: Adapter) -> None:
    """Warn once if the parameters move between two backward passes although no optimiser step was seen; the first step seen ends the watch."""
    for _, ops in acting(adapter):
        for op in ops.values():
            trained = [p for p in op.parameters() if p.requires_grad]
            if trained:
                _GUARDS[adapter] = trained[-1].register_post_accumulate_grad_hook(_Guard(adapter, trained))
                return


def disarm(adapter: Adapter) -> None:
    handle = _GUARDS.pop(adapter, None)
    if handle is not None:
        handle.remove()


class _Guard:
    """Looks at the parameters of one op after each backward pass."""

    def __init__(self, adapter: Adapter, params: list[nn.Parameter]) -> None:
        self.adapter, self.params = weakref.ref(adapter), [weakref.ref(p) for p in params]
        self.before: list[Tensor] | None = None

    def __call__(self, _: Tensor) -> None:
        adapter, now = self.adapter(), [p for ref in self.params if (p := ref()) is not None]
        if adapter is None:
            return
        moved = self.before is not None and any(not torch.equal(a, b) for a, b in zip(self.before, now, strict=False))
        self.before = [p.detach().clone() for p in now]
        if moved:
            disarm(adapter)
            warnings.warn(
                f"the parameters of adapter {adapter.name!r} move, but not by a torch optimiser, so its method ({adapter.spec.method}) is never "
                "called: nothing that it does at training steps will happen. Train with torch.optim.Optimizer or a subclass of it.",
                stacklevel=2,
            )


__all__ = ["Step", "acting", "acts", "arm", "logged_losses", "planned_steps", "training_with", "unwatch", "watch"]
