"""Host: a module that carries ops in a slot, and the model itself, whose plan they follow (see `core.mixing` for how classes change)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.bank import Bank
from slimtune.core.carried import Ops, forgive_merged, shows_base_only
from slimtune.core.fold import entries
from slimtune.core.kind import Kind
from slimtune.core.mixing import generalise, specialise
from slimtune.core.op import Op
from slimtune.core.plan import NameLink, Plan
from slimtune.core.reach import check_copy
from slimtune.core.state import COPY, State
from slimtune.core.tap import Tap
from slimtune.kernels.dropout import forget


class Slot(nn.Module):
    """Where a hosted module keeps its ops: adapter name -> key -> op. State dicts show them, unless only the base is asked for."""

    bank: Bank | None = None  # where the pairs of mixed batches live

    def __init__(self, state: State, kind: Kind, path: str) -> None:
        super().__init__()
        self.state, self.kind, self.path = state, kind, path
        self.chained: tuple[Plan | None, Any] = (None, None)  # that plan's chain here
        self.flow: str | None = None  # what the rows of its input are, once a plan by rows has asked (see `core.rows`)
        self.looked: tuple[int, int | None] | None = None  # for how many rows, of a plan of how many
        self.facts: Any = None  # what a kind has found out about this module
        self.taps: dict[str, Tap] = {}  # entrance -> what brings its input here

    def put(self, name: str, key: str, op: Op) -> None:
        """Keep `op` for an adapter; `key` is a weight's name or a port."""
        if name not in self._modules:
            self._modules[name] = Ops(self.state, name, self.path)
        self._modules[name]._modules[key] = op  # type: ignore[union-attr]
        self.forget(name)

    def drop(self, name: str) -> None:
        self._modules.pop(name, None)
        self.forget(name)

    def forget(self, name: str | None = None) -> None:
        """Let go of what was worked out for the plan seen last, and of where an adapter was."""
        self.chained = (None, None)
        if self.bank is not None and name is not None:
            self.bank.leave(name)

    def children(self) -> Iterator[nn.Module]:
        yield from (m for m in self._modules.values() if m is not None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield nothing: those who go by it (accelerate's offloading, torch's quantisation) would take ops for layers that are called."""
        yield from ()

    def ops(self, name: str) -> list[Op]:
        """Return the ops of an adapter here, in the order they were attached."""
        held = self._modules.get(name)
        return list(held._modules.values()) if held is not None else []  # type: ignore[arg-type]

    def chain(self, links: list[NameLink], param: str | None = None) -> list[list[tuple[Op, Tensor | None]]]:
        """Return the chain of ops that `links` means here (of one weight, if `param` is given)."""
        chain: list[list[tuple[Op, Tensor | None]]] = []
        for link in links:
            if len(link) == 1 and link[0][1] is None:
                chain += [[(op, None)] for op in self.ops(link[0][0]) if param is None or op.param == param]
            else:
                found = [e for name, w in link for e in entries([op for op in self.ops(name) if param is None or op.param == param], w)]
                if found:
                    chain.append(found)
        return chain

    def tap(self, model: nn.Module, path: str) -> None:
        """Have the input of another module brought here."""
        if path not in self.taps:
            self.taps[path] = Tap(self, path)
            self.taps[path].fit(model.get_submodule(path))

    def untap(self, model: nn.Module) -> None:
        """Take off the hooks that no op here needs any more."""
        needed = {op.entrance for name in self._modules for op in self.ops(name)}
        for path in [p for p in self.taps if p not in needed]:
            self.taps.pop(path).remove(model)

    def far(self) -> dict[str, Tensor | None] | None:
        """Return the inputs of the entrances that ops here read, taken from this forward."""
        return {path: tap.take() for path, tap in self.taps.items()} if self.taps else None

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors of every adapter here (see `core.carried`)."""
        if shows_base_only():
            return destination if destination is not None else {}
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget()  # tensors may be replaced, not only written

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bank": None, "chained": (None, None)}


class Hosted:
    """Mixin of every module that carries ops."""

    rank = 1  # mixins stand in this order in front of the module's own class
    slim: Slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot: Slot = self._modules.get("slim")  # type: ignore[attr-defined]  # an attribute of a module takes long to find, and this runs for every token
        if slot is None:  # somebody captured this forward, and the adapters have been detached since
            return type(self).forward(self, *args, **kwargs)
        state = slot.state
        if state.unreached and not torch.compiler.is_compiling():  # until the first forward has been looked at (see `core.reach`)
            state.unreached.discard(slot.path)
            if COPY in state.unreached:
                check_copy(state, slot.path, self)  # type: ignore[arg-type]
        plan = state.current()
        base = super().forward  # type: ignore[misc]
        held = slot._modules
        for name in plan.names:
            if name in held:
                return slot.kind.forward(self, base, plan, args, kwargs)  # type: ignore[arg-type]
        return base(*args, **kwargs)


class KeepPlan:
    """A checkpoint function that runs the recomputation under the plan of the first run (see `st.keep_plan`)."""

    def __init__(self, state: State, func: Callable[..., Any]) -> None:
        self.state, self.func = state, func

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if torch.compiler.is_compiling():
            return self.func(fn, *args, **kwargs)
        plan = state.current()

        def planned(*inner: Any, **kw: Any) -> Any:
            leave = state.enter(plan)
            forget()
            try:
                return fn(*inner, **kw)
            finally:
                forget()
                leave()

        if self._reentrant(kwargs) and torch.is_grad_enabled():
            # The reentrant kind drops gradients silently when no input asks for one, as behind a frozen embedding.
            floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
            if floats and not any(isinstance(a, Tensor) and a.requires_grad for a in args):
                first = floats[0]
                args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
        return self.func(planned, *args, **kwargs)

    def _reentrant(self, kwargs: dict[str, Any]) -> bool:
        own = self.func.keywords if isinstance(self.func, functools.partial) else {}
        return bool({**own, **kwargs}.get("use_reentrant", False))


def host(module: nn.Module, state: State, kind: Kind, path: str) -> Slot:
    """Make a module a host and return its slot."""
    if "slim" not in module._modules:
        slot = Slot(state, kind, path)
        slot.facts = kind.study(module)
        module.add_module("slim", slot)
        module.register_load_state_dict_post_hook(forgive_merged)
        specialise(module, Hosted)
    return module._modules["slim"]  # type: ignore[return-value]


def unhost(module: nn.Module) -> None:
    """Give a module back its class once its slot is empty."""
    slot = module._modules.get("slim")
    if isinstance(slot, Slot) and not slot._modules:
        del module._modules["slim"]
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if hook is forgive_merged:
                del module._load_state_dict_post_hooks[key]
        generalise(module, Hosted)
