"""Merged weights that were changed in place since: the base that is kept aside follows, or unmerge is refused by name.

Some models write to their own weights (RWKV divides them by powers of two for inference, and multiplies them again for training). What is kept
aside does not take part in that, so giving it back would be the weights of another mode. Whether something was written is seen from the tensors'
version counters; what, by merging once more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slimtune.algebra.merged_values import merged_sites, merged_values
from slimtune.core.errors import MergeError
from slimtune.core.fold import Chain
from slimtune.core.placing import kind_at
from slimtune.core.state import State
from slimtune.ports.install import Exchange


def follow(model: nn.Module, state: State) -> None:
    """Scale the kept weights of the base as the merged ones in place have been scaled since the merge.

    Raises:
        MergeError: they have been changed in another way; nothing has changed then.
    """
    if state.merged_plan is None or not any(isinstance(step, Exchange) and step.changed() for step in state.merged):
        return
    found: list[tuple[Exchange, dict[str, float]]] = []
    wrong = []
    for (module, param, chain), step in zip(merged_sites(model, state.merged_plan.segments[0][1]), state.merged, strict=False):
        if isinstance(step, Exchange) and step.changed():
            factors = _factors(module, param, chain, step)
            if None in factors.values():
                wrong.append(str(module._modules["slim"].path))  # type: ignore[union-attr]
            found.append((step, {name: c for name, c in factors.items() if c is not None}))
    if wrong:
        raise MergeError(
            f"merged weights have been changed since the merge: {', '.join(wrong[:4])}{', ...' if len(wrong) > 4 else ''}. The "
            "base's own values, which are kept, would undo that change with the merge",
            where=type(model).__name__,
            hint="undo the change first, or keep the model as it is, without adapters: st.merge(model, keep=False)",
        )
    for step, scaled in found:
        for name, by in scaled.items():
            _scale(step.aside[name], by / step.scale.get(name, 1.0))
            step.scale[name] = by


def _factors(module: nn.Module, param: str, chain: Chain, step: Exchange) -> dict[str, float | None]:
    """Return by what each changed tensor of a module has been scaled since it was made, None where that is not what happened."""
    names, placed = step.changed(), dict(step.placed)
    now = {name: step.here(name) for name in names}
    step()
    try:
        for name in names:
            _scale(step.here(name), 1 / step.scale.get(name, 1.0))
        again = kind_at(module).write(module, param, *merged_values(module, param, chain))
        try:
            return {name: _factor(step.here(name), now[name]) for name in names}
        finally:
            again()
    finally:
        for name in names:
            _scale(step.here(name), step.scale.get(name, 1.0))
        step()
        step.placed = placed


def _factor(before: Tensor | None, after: Tensor | None) -> float | None:
    if before is None or after is None or before.shape != after.shape or not before.is_floating_point():
        return None
    before, after = before.detach(), after.detach()
    if torch.equal(before, after):
        return 1.0
    i = before.abs().argmax()
    c = float(after.flatten()[i] / before.flatten()[i])
    exact = c > 0 and math.frexp(c)[0] == 0.5  # a power of two: nothing is rounded, there and back
    return c if exact and torch.equal(before * c, after) else None


def _scale(t: Tensor | None, by: float) -> None:
    if t is not None and by != 1.0:
        with torch.no_grad():
            t.mul_(by)
