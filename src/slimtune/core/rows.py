"""Rows of a plan in modules that see more rows than the batch has: tokens of the batch laid end to end, or routed to them.

Many blocks flatten their input [B, T, d] to [B * T, d] before they call what is inside (shared experts, routers, channels of a time series). There
each row of the plan has its tokens in one piece, and the plan means blocks of rows. A module that is one of several and gets the tokens that a
router chose for it sees any number of them in any order: there rows cannot be told apart, also where the number happens to fit.

Which it is follows from what the modules around it were called with. They are found on Python's stack, once for each module: nothing has to be
recorded in forwards that do not need it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError

if TYPE_CHECKING:
    from slimtune.core.host import Slot
    from slimtune.core.plan import Plan
    from slimtune.core.state import State

BATCH, FLAT, ROUTED = "batch", "flat", "routed"
_CALL = nn.Module._call_impl.__code__


def fitting(plan: Plan, slot: Slot, host: nn.Module, x: Tensor, dim: int = 0) -> Plan:
    """Return the plan as it holds for a module's input x: itself, or meaning blocks of rows.

    Raises:
        PlanError: the rows of x are not those of the batch, nor blocks of them.
    """
    if torch.compiler.is_compiling():
        return plan.blocks() if slot.flow == FLAT else plan
    n = x.shape[dim]
    if slot.flow != FLAT and slot.looked != (n, plan.size):
        found = _look(plan, host, x, n)
        if found is None:
            return plan  # called by itself, or not known: the number of rows alone decides
        slot.flow, slot.looked = found, (n, plan.size)
        if found == ROUTED:
            slot.state.routed[slot.path] = type(host).__name__
    if slot.flow == ROUTED:
        raise routed(slot.path, type(host).__name__)
    return plan.blocks() if slot.flow == FLAT else plan


def check_routed(state: State, plan: Plan) -> None:
    """Raise if adapters of a plan by rows sit where it is known by now that rows cannot be told apart.

    Raises:
        PlanError: naming the first such module.
    """
    for path, kind in state.routed.items() if plan.size is not None else ():
        if any(path == at for name in plan.names for at, _ in state.adapters[name].ops):
            raise routed(path, kind)


def routed(path: str, kind: str) -> PlanError:
    """Return the error for a module that sees the tokens that a router chose for it."""
    return PlanError(
        "this module gets the tokens that were routed to it, in any number and order, so it cannot tell the rows of a batch apart",
        where=f"{path} ({kind})",
        hint="one adapter for the whole batch: st.use(model, name); or adapters that leave this module out with exclude=",
    )


def _look(plan: Plan, host: nn.Module, x: Tensor, n: int) -> str | None:
    """Find out what the rows of x are, from the innermost module around the host that was called with the batch as it is."""
    assert plan.size is not None
    outer: tuple[nn.Module, tuple[int, ...], bool] | None = None
    first = True
    for module, t in reversed(list(_around(sys._getframe(2), host))):
        dims = tuple(t.shape) if t.is_floating_point() else (*t.shape, 1)  # ids [B, T] stand for what has one dimension more
        if outer is None:
            if t.dim() and (t.shape[0] == plan.size or (plan.expand and t.shape[0] % plan.size == 0)):
                outer = (module, dims, t.is_floating_point())
        elif dims[0] != outer[1][0] or (len(dims) == 2 and len(outer[1]) > 2):
            break  # here it has been flattened already, also where the number happens to be the same
        else:
            outer, first = (module, dims, t.is_floating_point()), False
    if outer is None:
        return None
    module, dims, real = outer
    if x.dim() >= len(dims):
        return BATCH if n == dims[0] else None
    chosen = real and x.dim() == 2 and _one_of_several(module, host)
    j = len(dims) - x.dim()
    flat = tuple(x.shape[:-1]) == (math.prod(dims[: j + 1]), *dims[j + 1 : -1])
    if chosen and not (first and n == dims[0]):
        return ROUTED
    if flat and not chosen:
        return FLAT
    return BATCH if n == dims[0] else None


def _around(frame: FrameType | None, host: nn.Module) -> Iterable[tuple[nn.Module, Tensor]]:
    """Yield the modules whose calls are running, the innermost first, with the first tensor that each was called with."""
    while frame is not None:
        if frame.f_code is _CALL:
            held: dict[str, Any] = frame.f_locals
            module = held["self"]
            tensors = [t for t in (*held["args"], *held["kwargs"].values()) if isinstance(t, Tensor)]
            if module is not host and tensors:
                yield module, tensors[0]
        frame = frame.f_back


def _one_of_several(module: nn.Module, host: nn.Module) -> bool:
    """Tell whether a module lies in a list or table of modules inside of another."""
    from slimtune.core.placing import base_modules

    inside = base_modules(module)
    path = next((p for p, m in inside.items() if m is host), "")
    parts = path.split(".")
    return any(isinstance(inside.get(".".join(parts[:i])), (nn.ModuleList, nn.ModuleDict)) for i in range(1, len(parts)))
