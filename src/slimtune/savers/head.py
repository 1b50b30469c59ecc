"""Lean loss head: while a loss is computed, the output head hands on its input, and logits come into being only if somebody reads them.

The head returns `PendingLogits`, a tensor without storage that knows the hidden states and the head. The model's loss function takes the
supervised rows and computes their loss in chunks (`kernels.loss`); any other use of the logits (printing, argmax, soft-capping, a metric) makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.kernels.loss import head_loss
from slimtune.kernels.lowrank import fusing


class PendingLogits(Tensor):
    """Logits [.., V] that do not exist yet; every torch function called on them makes them first."""

    hidden: Tensor
    head: nn.Module
    made: Tensor | None

    @staticmethod
    def of(hidden: Tensor, head: nn.Module) -> PendingLogits:
        """Return the logits of `hidden` [.., d] under `head`, not yet computed."""
        shape = (*hidden.shape[:-1], head.weight.shape[0])  # type: ignore[union-attr, index]
        blank = hidden.new_empty(1).expand(shape).as_subclass(PendingLogits)
        blank.hidden, blank.head, blank.made = hidden, head, None
        return blank

    def make(self) -> Tensor:
        """Return the real logits, computed once."""
        if self.made is None:
            self.made = F.linear(self.hidden, self.head.weight, self.head.bias)  # type: ignore[arg-type]
        return self.made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__ if hasattr(func, "__name__") else ""
        if name == "__get__" and getattr(func, "__self__", None) in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in {"size", "dim", "numel", "ndimension"}:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_make(args), **_make(kwargs or {}))


_METADATA = {Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim}


def _make(tree: Any) -> Any:
    if isinstance(tree, PendingLogits):
        return PendingLogits.make(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_make(t) for t in tree)
    if isinstance(tree, dict):
        return {k: _make(v) for k, v in tree.items()}
    return tree


class LeanHead:
    """Mixin of the output head: hands on its input while its model computes a loss."""

    rank = 2
    slim_pending: bool

    def forward(self, x: Tensor) -> Tensor:
        ready = self.slim_pending and torch.is_grad_enabled() and x.requires_grad and fusing(x)
        if not ready or self.weight.requires_grad:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        return PendingLogits.of(x, self)  # type: ignore[arg-type]


class LeanLoss:
    """Mixin of a causal language model whose loss function is transformers' own."""

    rank = 0.5
    keeps_signature = True
    slim_head: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        head = self.get_submodule(self.slim_head)  # type: ignore[attr-defined]
        if kwargs.get("labels") is None or "slim" in head._modules:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        head.slim_pending = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            head.slim_pending = False


class ChunkedLoss:
    """Stands in for transformers' causal loss: same arguments, same value; full logits only if it is given full logits."""

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self.plain = plain

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
        shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if not isinstance(logits, PendingLogits):
            return self.plain(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(logits.hidden.device)
        rows = (target != ignore_index).nonzero().squeeze(-1)
        hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1]).index_select(0, rows)
        head = logits.head
        total = head_loss(hidden, head.weight, head.bias, target[rows], smoothing=float(kwargs.get("label_smoothing", 0.0)))  # type: ignore[arg-type]
        return total / (num_items_in_batch if num_items_in_batch is not None else rows.numel())
