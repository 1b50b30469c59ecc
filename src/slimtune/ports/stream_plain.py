"""The forward of any other module with virtual tokens: they stand at dim 1 of its first tensor, and rows with other prompts run after each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimtune.core.errors import CapabilityError, PlanError
from slimtune.core.fold import Chain, first_tensor, put, replace_first, take
from slimtune.core.kind import join, split_input
from slimtune.core.plan import Plan
from slimtune.core.tasks import tasks_of
from slimtune.ports.virtual import every, joined, segments


def plain(host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module with virtual tokens at dim 1 of its first tensor; rows with different prompts run one after the other."""
    where = f"{host.slim.path} ({type(host).__name__})"
    x, rest, kw = split_input(args, kwargs)
    if x.dim() != 3 or not x.is_floating_point():
        raise PlanError(f"virtual tokens go into [batch, tokens, width], not into {list(x.shape)} {x.dtype}", where=where, hint="name another module")
    batch, n = x.shape[:2]
    others = [t for t in (*rest, *kw.values()) if isinstance(t, Tensor) and n in t.shape]
    if others:
        raise CapabilityError(
            f"the module also gets a tensor {list(others[0].shape)} that may count its tokens, which virtual ones would not fit",
            where=where,
            hint="call it with its tokens alone: rows may have different prompts without a mask",
        )

    def run(xs: Tensor, chain: Chain, tasks: Tensor | None) -> Any:
        virtual = joined(chain, xs, tasks)
        p = virtual.shape[1]
        out = join(base, torch.cat([virtual.expand(xs.shape[0], -1, -1), xs], 1), rest, kw)
        y = first_tensor(out)
        if y.dim() < 2 or y.shape[1] != p + n:
            raise PlanError(f"the output {list(y.shape)} has not one place for each of {p} + {n} tokens", where=where, hint="name another module")
        kept = any(op.keep for op in every(chain))
        return out if kept or not p else replace_first(out, y[:, p:])

    tasks = tasks_of(host.slim.state, batch, x.device, plan.expand)
    parts = segments(host, plan, batch, x.device, "stream")
    if parts[0][0] is None:
        return run(x, parts[0][1], tasks)
    total: Tensor | None = None
    for rows, chain, _ in parts:
        assert rows is not None
        out = run(take(x, rows, 0), chain, None if tasks is None else take(tasks, rows, 0))
        if not isinstance(out, Tensor):
            raise CapabilityError(
                f"rows= cannot be put together from what the module returns ({type(out).__name__})", where=where, hint="one plan for all rows"
            )
        total = out.new_zeros(batch, *out.shape[1:]) if total is None else total
        total = put(total, rows, out, 0)
    return total
