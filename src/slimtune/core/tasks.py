"""Tasks: which task each row of a batch belongs to, for methods whose parameters depend on it (multitask prompts)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.core.state import State, state_of

_SCOPE: ContextVar[Mapping[Any, Tensor | None]] = ContextVar("slimtune_tasks", default=MappingProxyType({}))


class tasks:
    """Say which task each row of the next batches is of: from now on, or, in a `with` statement, inside the block.

    Args:
        model: a model with adapters.
        ids: task number of each row [B], one number for all rows, or None to forget them.

    Raises:
        PlanError: these are no task numbers.

    Example:
        >>> with st.tasks(model, [0, 0, 2]):  # doctest: +SKIP
        ...     model(**batch_of_three)
    """

    def __init__(self, model: nn.Module, ids: int | Sequence[int] | Tensor | None) -> None:
        self._state, self._ids = state_of(model), _read(ids)
        self._before = self._state.tasks
        self._state.tasks = self._ids
        self._tokens: list[tuple[Token[Any], Tensor | None]] = []

    def __enter__(self) -> tasks:
        if not self._tokens:
            self._state.tasks = self._before  # it turns out to be a block
        self._tokens.append((_SCOPE.set({**_SCOPE.get(), self._state: self._ids}), self._state.block_tasks))
        self._state.block_tasks = self._ids
        return self

    def __exit__(self, *exc: object) -> None:
        token, self._state.block_tasks = self._tokens.pop()
        with contextlib.suppress(ValueError):  # closed in another context than it was opened in, which ends with it
            _SCOPE.reset(token)


@contextlib.contextmanager
def no_tasks(state: State) -> Iterator[None]:
    """Have nobody say a task, for calls with rows of our own."""
    before, token = state.block_tasks, _SCOPE.set({**_SCOPE.get(), state: None})
    state.block_tasks = None
    try:
        yield
    finally:
        state.block_tasks = before
        _SCOPE.reset(token)


def _read(ids: Any) -> Tensor | None:
    if ids is None:
        return None
    try:
        read = torch.as_tensor(ids)
    except (ValueError, TypeError, RuntimeError):
        read = torch.zeros(0, 0)
    if read.dim() > 1 or read.is_floating_point() or read.is_complex() or read.dtype == torch.bool or (read < 0).any():
        raise PlanError(f"tasks are whole numbers from 0, one for each row, not {str(ids)[:80]}", hint="st.tasks(model, [0, 2, 1])")
    return read.long()


def tasks_of(state: State, batch: int, device: torch.device, expand: bool) -> Tensor | None:
    """Return the task of each row of a batch [B], or None where nobody has said.

    Args:
        expand: the batch may hold each row several times in a block (beams).

    Raises:
        PlanError: they were given for another number of rows.
    """
    if torch.compiler.is_compiling():  # context variables cannot be traced: compiled code reads what was entered last
        ids = state.block_tasks if state.block_tasks is not None else state.tasks
    else:
        ids = _SCOPE.get().get(state, state.tasks)
    if ids is None:
        return None
    if ids.dim() == 0:
        return ids.to(device).expand(batch)
    k, odd = divmod(batch, ids.shape[0])
    if odd or not k or (k > 1 and not expand):
        raise PlanError(f"{ids.shape[0]} task numbers were given for a batch of {batch} rows", hint="st.tasks(model, ids) with one for each row")
    return ids.to(device).repeat_interleave(k) if k > 1 else ids.to(device)
