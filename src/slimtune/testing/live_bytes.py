"""Exact live and peak bytes of tensors, without a GPU: every new storage is counted when it is made and when it goes.

    with LiveBytes() as live:
        loss = model(**batch).loss
        kept = live.now
        loss.backward()
    peak = live.peak
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is active: `now` (alive), `peak` (most alive at once)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {id_ for t in _tensors((args, kwargs or {})) for id_ in [_key(t)]}
        for t in _tensors(out):
            key = _key(t)
            if key in self._known or key in before:
                continue
            storage = t.untyped_storage()
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            self._known[key] = weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.pop(key, None)


def _key(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.layout == torch.strided and tree.device.type != "meta" else []
    if isinstance(tree, (list, tuple)):
        return [t for x in tree for t in _tensors(x)]
    if isinstance(tree, dict):
        return [t for x in tree.values() for t in _tensors(x)]
    return []
