"""merge / unmerge: fold adapters into the weights, and take them out again bit for bit.

The merged weight is computed in float32 (float64 on a float64 base) and rounded once to the base's dtype, or requantised. The old
parameter objects are kept aside, so unmerge gives back the very bits. What rounding took from the adapter's change is measured, and said
where it is more than a little.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, MergeError
from slimtune.core.fold import Chain, members
from slimtune.core.host import Slot
from slimtune.core.op import affine
from slimtune.core.placing import kind_at
from slimtune.core.plan import NameLink, Plan, Which
from slimtune.core.state import BARE, State, state_of, unwrap
from slimtune.ports.effective import effective


def merge(model: nn.Module, which: Which = None, *, out: str | Path | None = None) -> None:
    """Fold adapters into the base's weights; a plain call of the model then includes them, once.

    Args:
        which: a name, a list (stack) or a mapping (weighted sum); default: what is in use now.
        out: instead of changing the model, write a merged plain checkpoint to this folder, tensor by tensor.

    Raises:
        CapabilityError: an op has no exact form on the weight; nothing has changed then.
        MergeError: something is merged already.
    """
    model = unwrap(model)
    state = state_of(model)
    plan = state.current() if which is None else Plan.of(which)
    state.check(plan)
    if plan.size is not None:
        raise MergeError("a plan that differs by row cannot be merged", hint="name the adapter: st.merge(model, 'name')")
    if not plan.names:
        raise MergeError("there is nothing to merge: no adapter is in use", hint=f"st.merge(model, name); attached: {', '.join(state.adapters)}")
    if state.in_block():
        raise MergeError("a `with st.use(...)` block is open", hint="merge outside of it")
    if state.merged:
        raise MergeError("an adapter is merged already", hint="st.unmerge(model) first, or merge a stack at once: st.merge(model, ['a', 'b'])")
    links = plan.segments[0][1]
    check_affine(model, state, links)
    if out is not None:
        from slimtune.algebra.merge_to_disk import merge_to_disk

        merge_to_disk(model, links, Path(out))
        return
    undo: list[Callable[[], None]] = []
    lost = Lost()
    try:
        for module, param, chain in merged_sites(model, links):
            weight, bias = merged_values(module, param, chain)
            before = None if weight is None else lost.read(module, param, weight)
            undo.append(kind_at(module).write(module, param, weight, bias))
            if weight is not None and before is not None:
                lost.add(module, param, before, weight)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    state.merged = undo
    state.merged_plan = plan
    state.settle(BARE)
    lost.report()


MUCH = 0.5  # share of a change that rounding may take before somebody is told


class Lost:
    """What rounding to the base's type (or quantising again) takes from the change that adapters make to the weights."""

    def __init__(self) -> None:
        self.error = self.change = 0.0
        self.worst = (0.0, "", "")

    def read(self, module: nn.Module, param: str, weight: Tensor) -> Tensor | None:
        """Return a copy of the weight as it is, None where nothing is rounded."""
        slot: Slot = module._modules["slim"]  # type: ignore[assignment]
        found = slot.kind.read(module, param)
        own = module._parameters.get(param)
        exact = own is not None and own.dtype == weight.dtype
        return None if exact or found.is_meta else found.to(weight.dtype, copy=True)

    def add(self, module: nn.Module, param: str, before: Tensor, weight: Tensor) -> None:
        """Compare what one weight has become with what it should be."""
        slot: Slot = module._modules["slim"]  # type: ignore[assignment]
        now = slot.kind.read(module, param).to(weight.dtype)
        error, change = float((now - weight).square().sum()), float((weight - before).square().sum())
        self.error, self.change = self.error + error, self.change + change
        share = math.sqrt(error / change) if change else 0.0
        self.worst = max(self.worst, (share, slot.path, str(now.dtype if (p := module._parameters.get(param)) is None else p.dtype)))

    def report(self) -> None:
        """Warn if it is much."""
        share = math.sqrt(self.error / self.change) if self.change else 0.0
        if share > MUCH:
            worst, path, dtype = self.worst
            warnings.warn(
                f"merging into weights kept as {dtype.removeprefix('torch.')} rounds by {share:.0%} of what the adapter changes there "
                f"(most at {path}: {worst:.0%}). Compare outputs before you rely on it; unmerged, or merged into a float32 base, nothing is lost",
                stacklevel=3,
            )


def unmerge(model: nn.Module) -> None:
    """Give the base its very bits back and put the adapters that were merged into use again.

    Raises:
        MergeError: nothing is merged.
    """
    state = state_of(unwrap(model))
    if not state.merged:
        raise MergeError("nothing is merged", hint="st.merge(model, name) comes first")
    for step in reversed(state.merged):
        step()
    plan = state.merged_plan
    state.merged, state.merged_plan = [], None
    assert plan is not None
    state.settle(plan)


def check_affine(model: nn.Module, state: State, links: list[NameLink]) -> None:
    """Raise unless every op of the links has an exact form on the weights.

    Raises:
        CapabilityError: naming the method, the first site and the reason.
    """
    for name in {n for link in links for n, _ in link}:
        adapter = state.adapter(name)
        for (path, _), op in adapter.ops.items():
            if not affine(op):
                raise CapabilityError(
                    f"{name!r} cannot be merged: {type(op).__name__} is no affine map of its input, so no weight equals it",
                    where=f"{path} (method {op.method})",
                    hint="keep it unmerged; st.methods() shows which methods merge",
                )


def merged_sites(model: nn.Module, links: list[NameLink]) -> list[tuple[nn.Module, str, Chain]]:
    """Return (module, param, chain) of every weight that the links change."""
    found = []
    for _, module in model.named_modules():
        slot = module._modules.get("slim")
        if isinstance(slot, Slot):
            for param in slot.kind.names(module):
                chain = slot.chain(links, param)
                if chain:
                    found.append((module, param, chain))
    return found


def merged_values(module: nn.Module, param: str, chain: Chain) -> tuple[Tensor | None, Tensor | None]:
    """Return the merged (weight, bias) of one site in canonical shape, None where a value does not change."""
    slot: Slot = module._modules["slim"]  # type: ignore[assignment]
    ops = [member for link in chain for op, _ in link for member in members(op)]
    with torch.no_grad():
        W = slot.kind.read(module, param)
        work = W.dtype if W.dtype == torch.float64 else torch.float32
        old = slot.kind.bias(module, param)
        weight, bias = effective(W.to(work), None if old is None else old.to(work), chain, module)
    return (weight if any(hasattr(op, "weight") for op in ops) else None), (bias if any(hasattr(op, "bias") for op in ops) else None)


def lifted(model: nn.Module) -> Callable[[], None]:
    """Take the merged values out for a while (pointer swaps only); the function returned puts them back."""
    exchanges = list(state_of(model).merged)
    for step in reversed(exchanges):  # newest first, as in unmerge: two exchanges may hold the same parameter
        step()

    def back() -> None:
        for step in exchanges:
            step()

    return back
