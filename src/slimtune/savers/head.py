"""Lean loss head: while a model computes a loss, its output head hands on its input, and logits come into being only if somebody reads them.

The head returns `PendingLogits`, a tensor without storage that knows the hidden states and the head. What models do to logits on the way to
their loss (a type, a shape, a soft cap, a scale, a bias over the vocabulary) is noted; `cross_entropy` at the end of that way takes the supervised
rows and computes their loss in chunks (`kernels.loss`). Any other use of the logits (printing, argmax, a metric) makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.plan import Plan
from slimtune.kernels.loss import any_head_loss, head_loss
from slimtune.kernels.lowrank import fusing

Noted = tuple[str, Any]  # what was done to logits: its name, and its operand or None

_DO: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "to": lambda t, dtype: t.to(dtype),
    "div": lambda t, c: t / c,
    "mul": lambda t, c: t * c,
    "tanh": lambda t, _: torch.tanh(t),
    "add": lambda t, b: t + b,
}
_SPELLED = {
    "div": "div", "__truediv__": "div", "true_divide": "div", "mul": "mul", "__mul__": "mul", "__rmul__": "mul", "multiply": "mul", "tanh": "tanh",
    "add": "add", "__add__": "add", "__radd__": "add",
}  # fmt: skip


class PendingLogits(Tensor):
    """Logits [.., V] that do not exist yet; a torch function that is not known to lead to a loss makes them first."""

    hidden: Tensor
    head: Any
    plan: Plan | None
    noted: tuple[Noted, ...]
    made: Tensor | None

    @staticmethod
    def of(hidden: Tensor, head: Any, plan: Plan | None, noted: tuple[Noted, ...] = (), dtype: torch.dtype | None = None) -> PendingLogits:
        """Return the logits of `hidden` [.., d] under `head` and what is noted, not yet computed."""
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        blank = hidden.new_empty(1, dtype=dtype or hidden.dtype).expand(shape).as_subclass(PendingLogits)
        blank.hidden, blank.head, blank.plan, blank.noted, blank.made = hidden, head, plan, noted, None
        return blank

    def apply(self, hidden: Tensor) -> Tensor:
        """Return real logits of some hidden states."""
        t: Tensor = self.head.logits(hidden, self.plan)
        for name, operand in self.noted:
            t = _DO[name](t, operand)
        return t

    def make(self) -> Tensor:
        """Return the real logits, computed once."""
        if self.made is None:
            self.made = self.apply(self.hidden)
        return self.made

    def then(self, name: str, operand: Any) -> PendingLogits:
        """Return these logits with one more thing noted."""
        dtype = operand if name == "to" else torch.promote_types(self.dtype, operand.dtype) if isinstance(operand, Tensor) else self.dtype
        return PendingLogits.of(self.hidden, self.head, self.plan, (*self.noted, (name, operand)), dtype)

    def shaped(self, shape: tuple[int, ...]) -> PendingLogits:
        """Return these logits with other leading dimensions."""
        hidden = self.hidden.reshape(*shape[:-1], self.hidden.shape[-1])
        return PendingLogits.of(hidden, self.head, self.plan, self.noted, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (name == "__get__" and getattr(func, "__self__", None) in _METADATA) or name in {"size", "dim", "numel", "ndimension"}:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _cross_entropy(*args, **kwargs) if func is F.cross_entropy else _noted(name, args, kwargs)
        return func(*_make(args), **_make(kwargs)) if found is None else found


_METADATA = {Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim}


def _make(tree: Any) -> Any:
    if isinstance(tree, PendingLogits):
        return PendingLogits.make(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_make(t) for t in tree)
    if isinstance(tree, dict):
        return {k: _make(v) for k, v in tree.items()}
    return tree


def _noted(name: str, args: Any, kwargs: Any) -> PendingLogits | None:
    """Return the pending logits after a function, or None if it is none of those that lead to a loss."""
    t = args[0] if args else None
    if kwargs or not isinstance(t, PendingLogits) or t.made is not None:
        return None
    vocabulary, rest = t.shape[-1], args[1:]
    if name in {"view", "reshape"}:
        shape = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        rows = math.prod(t.shape[:-1])
        if not all(type(n) is int for n in shape) or not shape or shape[-1] != vocabulary or shape.count(-1) > 1:
            return None
        known = math.prod(n for n in shape[:-1] if n != -1)
        if -1 in shape:
            return t.shaped(tuple(rows // known if n == -1 else n for n in shape)) if known and rows % known == 0 else None
        return t.shaped(shape) if known == rows else None
    if name == "contiguous" and not rest:
        return t
    if name in {"float", "to"}:
        wide = torch.float32 if name == "float" else rest[0] if len(rest) == 1 else None
        if wide in (t.device, str(t.device)):
            return t
        return t.then("to", wide) if isinstance(wide, torch.dtype) and wide.is_floating_point else None
    does = _SPELLED.get(name)
    if does == "tanh":
        return t.then(does, None)
    operand = rest[0] if len(rest) == 1 else None
    if does in {"div", "mul"} and isinstance(operand, (int, float)):
        return t.then(does, operand)
    over_vocabulary = isinstance(operand, Tensor) and not isinstance(operand, PendingLogits) and operand.numel() == vocabulary == operand.shape[-1]
    if does == "add" and over_vocabulary and operand.dim() <= t.dim() and not operand.requires_grad:  # type: ignore[union-attr]
        return t.then(does, operand.detach().reshape(-1))  # type: ignore[union-attr]
    return None


def _cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """Return torch's cross entropy of pending logits [n, V], or None where it must be computed from real ones."""
    whole = isinstance(input, PendingLogits) and input.made is None and input.dim() == 2 and isinstance(target, Tensor) and target.dim() == 1
    if not whole or weight is not None or size_average is not None or reduce is not None or reduction not in {"mean", "sum"}:
        return None
    if target.is_floating_point() or target.shape[0] != input.shape[0]:
        return None
    rows = (target != ignore_index).nonzero().squeeze(-1)
    hidden, target = input.hidden.index_select(0, rows), target[rows]
    wide = torch.promote_types(input.dtype, torch.float32)
    plain = _frozen(input)
    if plain is None:
        total = any_head_loss(hidden, input.apply, _trained(input), target, smoothing=label_smoothing, wide_type=wide)
    else:
        total = head_loss(hidden, input.head.weight, plain[0], target, smoothing=label_smoothing, softcap=plain[1], wide_type=wide)
    return (total / rows.numel() if reduction == "mean" else total).to(input.dtype)


def _trained(logits: PendingLogits) -> list[Tensor]:
    """Return the parameters that get a gradient through the head, wherever they live: those that one row of logits leads back to."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        row: Any = logits.apply(logits.hidden.detach().reshape(-1, logits.hidden.shape[-1])[:1])
    seen, todo = set(), [row.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def _frozen(logits: PendingLogits) -> tuple[Tensor | None, float] | None:
    """Return (bias, soft cap) if the logits are a frozen linear map with nothing but these behind it, else None."""
    head = logits.head
    if "slim" in head._modules or any(p.requires_grad for p in head.parameters()):
        return None
    bias, done = head.bias, [n for n in logits.noted if n[0] != "to"]
    if done and done[0][0] == "add":
        extra = done.pop(0)[1].to(head.weight.dtype)
        bias = extra if bias is None else bias + extra
    if not done:
        return bias, 0.0
    capped = [name for name, _ in done] == ["div", "tanh", "mul"] and done[0][1] == done[2][1] and done[0][1] > 0
    return (bias, float(done[0][1])) if capped else None


class LeanHead:
    """Mixin of the output head: hands on its input while its model computes a loss."""

    rank = 0.9  # in front of `Hosted`: an adapter on the head acts when logits are made
    slim_pending: bool

    def forward(self, x: Tensor) -> Tensor:
        asks = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))  # type: ignore[attr-defined]
        if not (self.slim_pending and asks and fusing(x)):
            return super().forward(x)  # type: ignore[misc]
        slot = self._modules.get("slim")  # type: ignore[attr-defined]
        plan: Plan | None = slot.state.current() if slot is not None else None
        if plan is not None and plan.size is not None:  # rows of a batch cannot be told apart in chunks of tokens
            return super().forward(x)  # type: ignore[misc]
        return PendingLogits.of(x, self, plan)

    def logits(self, x: Tensor, plan: Plan | None) -> Tensor:
        """Return the logits of hidden states [.., d] under the plan of the forward they come from."""
        if plan is None:
            return super().forward(x)  # type: ignore[misc]
        leave = self._modules["slim"].state.enter(plan)  # type: ignore[attr-defined]
        try:
            return super().forward(x)  # type: ignore[misc]
        finally:
            leave()


class LeanLoss:
    """Mixin of a language model that computes its loss from its head's logits."""

    rank = 0.5
    keeps_signature = True
    slim_head: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        head = self.get_submodule(self.slim_head)  # type: ignore[attr-defined]
        head.slim_pending = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            head.slim_pending = False


def is_head(module: nn.Module | None) -> bool:
    """Tell whether a module is an output head that can wait: a linear map with a dense weight."""
    return isinstance(module, nn.Linear) and module.weight.is_floating_point()
