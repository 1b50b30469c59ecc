"""Is every op reached? A model may read a layer's weight without calling the layer; an op there would train without effect, in silence.

At the first forward of the whole model with an adapter in use, the modules that carry its ops and were not called are named, once. Modules whose
siblings were called (an expert that no token was sent to, a layer that was dropped) are not: a forward need not reach all of them.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimtune.core.errors import SiteError
from slimtune.core.state import COPY

if TYPE_CHECKING:
    from slimtune.core.state import State

CALL = nn.Module._call_impl.__code__
SHOWN = 6  # paths that one sentence names


class NotReachedWarning(UserWarning):
    """Modules that carry an adapter were not called when the model ran."""


def after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a model with adapters: name the modules of the plan that this forward has not called."""
    if torch.compiler.is_compiling():
        return
    state: State | None = model.__dict__.get("slim_state")
    if state is None or not state.unreached:
        return
    names = state.current().names
    used = {path for name in names if name in state.adapters for path, _ in state.adapters[name].ops}
    missed = state.unreached & used
    if not missed:
        return
    state.unreached -= missed
    alive = {family(path) for path in used - missed}
    # Ops on weights that are tied to each other share what they do: one of them is enough (T5's `shared` is never called itself).
    acting = _ties(state, names, used - missed)
    bypassed = sorted(path for path in missed if family(path) not in alive and not _ties(state, names, {path}) & acting)
    if bypassed:
        state.bypassed |= set(bypassed)
        warnings.warn(sentence(bypassed, len(used)), NotReachedWarning, stacklevel=2)


def check_copy(state: State, path: str, module: nn.Module) -> None:
    """Raise if a module whose state was copied along with it runs in a model with another state: a block replaced by its copy, or added as one.

    Raises:
        SiteError: it follows no `use` of that model.
    """
    roots = [found for m in running(sys._getframe(2)) if (found := m.__dict__.get("slim_state")) is not None]
    if any(found is state for found in roots):
        state.unreached.discard(COPY)
    elif roots:
        raise SiteError(
            "this is a copy of a part of a model with adapters: what it carries follows neither st.use nor training of the model that it is in now",
            where=f"{path} ({type(module).__name__})",
            hint="copy blocks before st.attach: st.save the adapter, st.detach it, copy, then attach or load again",
        )


def running(frame: FrameType | None) -> Iterator[nn.Module]:
    """Yield the modules whose calls are running here, the innermost first."""
    while frame is not None:
        if frame.f_code is CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _ties(state: State, names: Iterable[str], paths: set[str]) -> set[int]:
    ops = [op for name in names if name in state.adapters for (path, _), op in state.adapters[name].ops.items() if path in paths]
    return {id(tied) for op in ops if (tied := getattr(op, "tied", None)) is not None}


def merging(state: State, paths: Iterable[str]) -> None:
    """Say that merging makes an adapter act where it did not before."""
    if bypassed := sorted(set(paths) & state.bypassed):
        warnings.warn(f"{note(bypassed)}; merged, it does", NotReachedWarning, stacklevel=3)


def said(model: nn.Module, paths: set[str]) -> list[str]:
    """Return what a report says of those of these modules that were not called, if there are any."""
    state: State | None = model.__dict__.get("slim_state")
    bypassed = state.bypassed & paths if state is not None else set()
    return [note(bypassed)] if bypassed else []


def note(paths: Iterable[str]) -> str:
    """Name modules that were not called."""
    families = list(dict.fromkeys(map(family, sorted(paths))))
    shown = ", ".join(families[:SHOWN]) + (", ..." if len(families) > SHOWN else "")
    return f"not called when the model ran, so the adapter did nothing there: {shown}"


def family(path: str) -> str:
    """Return a path without the numbers in it: the same for the blocks of a stack, and for the experts of a layer."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def sentence(paths: list[str], total: int) -> str:
    """Say which modules were not called, and what to do."""
    families = list(dict.fromkeys(map(family, paths)))
    shown = ", ".join(families[:SHOWN]) + (", ..." if len(families) > SHOWN else "")
    ends = tuple(dict.fromkeys(f.rpartition(".")[2] for f in families))
    return (
        f"{len(paths)} of the {total} modules that carry the adapter were not called in this forward: {shown}. If the model reads their weights "
        f"without calling them, the adapter does nothing there until it is merged: leave them out with exclude={ends!r}. "
        "If this input does not need them (no picture, no decoder), all is well."
    )
