"""merge / unmerge: fold adapters into the weights, and take them out again bit for bit.

The merged weight is computed in float32 (float64 on a float64 base) and rounded once to the base's dtype, or requantised. The old
parameter objects are kept aside, so unmerge gives back the very bits, or let go where nobody will ask for them (`permanent`). What rounding took
from the adapter's change is measured, and said where it is more than a little.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimtune.algebra.follow import follow
from slimtune.algebra.merged_values import check_affine, merged_sites, merged_values
from slimtune.algebra.permanent import merge_for_good, strip
from slimtune.algebra.ties import Tied
from slimtune.core.changed import check_hosts
from slimtune.core.elsewhere import check_here
from slimtune.core.errors import MergeError
from slimtune.core.fold import Chain
from slimtune.core.host import Slot
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.plan import Plan, Which
from slimtune.core.reach import merging
from slimtune.core.state import BARE, state_of, unwrap
from slimtune.ports.install import Exchange


def merge(model: nn.Module, which: Which = None, *, out: str | Path | None = None, keep: bool = True) -> None:
    """Fold adapters into the base's weights; a plain call of the model then includes them, once.

    Args:
        which: a name, a list (stack) or a mapping (weighted sum); default: what is in use now.
        out: instead of changing the model, write a merged plain checkpoint to this folder, tensor by tensor.
        keep: keep the old weights beside the merged ones, for `unmerge`. False lets them go, layer by layer, and leaves a plain model: its very
            first classes everywhere, no adapter, no hook. Of a model that is merged already it makes that merge final.

    Raises:
        CapabilityError: an op has no exact form on the weight; nothing has changed then.
        MergeError: something is merged already, or a merged value would not be finite; nothing has changed then.

    Example:
        >>> import slimtune as st, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = st.attach(model, st.LoRA(r=2))
        >>> st.merge(model, keep=False)
        >>> type(model[0]) is torch.nn.Linear
        True
    """
    model = unwrap(model)
    state = state_of(model)
    if out is not None and not keep:
        raise MergeError("out= leaves the model as it is, keep=False would make it plain", hint="one call for each: st.merge(model, out=...) first")
    if state.merged and not keep and state.merged_plan is not None and (which is None or _same(Plan.of(which), state.merged_plan)):
        strip(model, state, state.merged_plan.names)
        return
    plan = state.current() if which is None else Plan.of(which)
    state.check(plan)
    if plan.size is not None:
        raise MergeError("a plan that differs by row cannot be merged", hint="name the adapter: st.merge(model, 'name')")
    if not plan.names:
        raise MergeError("there is nothing to merge: no adapter is in use", hint=f"st.merge(model, name); attached: {', '.join(state.adapters)}")
    if state.in_block():
        raise MergeError("a `with st.use(...)` block is open", hint="merge outside of it")
    if state.merged:
        raise MergeError(
            "an adapter is merged already",
            hint="st.unmerge(model) first, or merge a stack at once: st.merge(model, ['a', 'b']); st.merge(model, keep=False) makes this merge final",
        )
    links = plan.segments[0][1]
    for name in plan.names:
        check_hosts(model, state.adapter(name))
    check_affine(model, state, links)
    check_here(base_modules(model).items())
    if out is not None:
        from slimtune.algebra.merge_to_disk import merge_to_disk

        merge_to_disk(model, links, Path(out))
        return
    undo: list[Callable[[], None]] = []
    lost = Lost()
    sites = merged_sites(model, links)
    merging(state, (path for name in plan.names for path, _ in state.adapter(name).ops))
    tied = Tied(model, sites)
    try:
        for module, param, chain in sites:
            exchange = _write(module, param, chain, lost)
            if keep:
                undo.append(exchange)
            else:
                exchange()  # tried only: nothing has changed until all of them fit
            del exchange  # or it would hold one layer while the next is made
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    if keep:
        undo += tied.settle()
        state.merged, state.merged_plan = undo, plan
        state.settle(BARE)
    else:
        merge_for_good(model, sites)
        strip(model, state, plan.names)
    lost.report()


def _write(module: nn.Module, param: str, chain: Chain, lost: Lost) -> Callable[[], None]:
    """Merge one weight, and return what exchanges the old values and the new."""
    weight, bias = merged_values(module, param, chain, lambda before, exact, now: lost.note(module, before, exact, now))
    change = 0.0 if weight is None else lost.change_of(module, param, weight)
    exchange = kind_at(module).write(module, param, weight, bias)
    if weight is not None and change:
        lost.add(module, param, change, weight)
    return exchange


def _same(a: Plan, b: Plan) -> bool:
    def links(plan: Plan) -> list[list[tuple[str, float | None]]]:
        return [[(name, None if w is None else float(w)) for name, w in link] for _, found in plan.segments for link in found]

    return links(a) == links(b)


MUCH = 0.5  # share of a change that rounding may take before somebody is told


class Lost:
    """What rounding to the base's type (or quantising again) takes from the change that adapters make to the weights."""

    def __init__(self) -> None:
        self.sites: dict[str, tuple[float, float, torch.dtype]] = {}  # path -> |error|^2, |change|^2, the type rounded to

    def change_of(self, module: nn.Module, param: str, weight: Tensor) -> float:
        """Return |merged - present|^2, 0 where nothing is rounded."""
        own = module._parameters.get(param)
        found = kind_at(module).read(module, param)
        exact = own is not None and own.dtype == weight.dtype
        return 0.0 if exact or found.is_meta else squared_gap(found, weight)

    def add(self, module: nn.Module, param: str, change: float, weight: Tensor) -> None:
        """Compare what one weight has become with what it should be."""
        slot: Slot = module._modules["slim"]  # type: ignore[assignment]
        now = slot.kind.read(module, param)
        kept = module._parameters.get(param)
        self._count(slot.path, squared_gap(now, weight), change, now.dtype if kept is None else kept.dtype)

    def note(self, module: nn.Module, before: Tensor, exact: Tensor, now: Tensor) -> None:
        """Compare rows as they were, as they should be and as they have become."""
        change = (before - exact).square_().sum()
        self._count(module._modules["slim"].path, float((now - exact).square_().sum()), float(change), now.dtype)  # type: ignore[union-attr, arg-type]

    def _count(self, path: str, error: float, change: float, dtype: torch.dtype) -> None:
        before = self.sites.get(path, (0.0, 0.0, dtype))
        self.sites[path] = (before[0] + error, before[1] + change, dtype)

    def report(self) -> None:
        """Warn if it is much."""
        change = sum(c for _, c, _ in self.sites.values())
        share = math.sqrt(sum(e for e, _, _ in self.sites.values()) / change) if change else 0.0
        if share > MUCH:
            worst, path, dtype = max((math.sqrt(e / c), path, str(kept)) for path, (e, c, kept) in self.sites.items() if c)
            warnings.warn(
                f"merging into weights kept as {dtype.removeprefix('torch.')} rounds by {share:.0%} of what the adapter changes there "
                f"(most at {path}: {worst:.0%}). Compare outputs before you rely on it; unmerged, or merged into a float32 base, nothing is lost",
                stacklevel=3,
            )


def squared_gap(a: Tensor, b: Tensor) -> float:
    """Return |a - b|^2 in the type of b, a few rows at a time: no temporary is as large as they are."""
    if not a.dim():
        return float((a.to(b.dtype) - b).square())
    rows = max(1, a.shape[0] // 16)
    return sum(float((x.to(y.dtype) - y).square().sum()) for x, y in zip(a.detach().split(rows), b.split(rows), strict=True))


def unmerge(model: nn.Module) -> None:
    """Give the base its very bits back and put the adapters that were merged into use again.

    Where the model has scaled the merged weights by powers of two meanwhile (RWKV does, whenever it changes between training and eval), the base's
    are scaled alike.

    Raises:
        MergeError: nothing is merged, or the merged weights have been changed since.
    """
    model = unwrap(model)
    state = state_of(model)
    if not state.merged:
        raise MergeError("nothing is merged", hint="st.merge(model, name) comes first")
    follow(model, state)
    for step in reversed(state.merged):
        step()
    plan = state.merged_plan
    state.merged, state.merged_plan = [], None
    assert plan is not None
    state.settle(plan)


def lifted(model: nn.Module) -> Callable[[], None]:
    """Take the merged values out for a while (pointer swaps only); the function returned puts them back."""
    state = state_of(model)
    follow(model, state)
    exchanges = list(state.merged)
    for step in reversed(exchanges):  # newest first, as in unmerge: two exchanges may hold the same parameter
        step()

    def back() -> None:
        moved = {type(step.module).__name__ for step in exchanges if isinstance(step, Exchange) and step.changed()}
        for step in exchanges:
            step()
        if moved:
            raise MergeError(
                f"weights of the base ({', '.join(sorted(moved))}) were changed in place while the merged ones were out, so these no longer fit",
                hint="st.unmerge(model), and merge again",
            )

    return back
