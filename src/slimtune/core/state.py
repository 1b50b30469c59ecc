"""State: what one model knows of its adapters, and which plan is current.

There is one default plan per model ("from now on") and, on top, plans of `with` blocks kept in a context variable: a block
in one thread or task never shows in another. Under torch.compile, which cannot trace context variables, the plan entered last counts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import NoSuchAdapter, PlanError, SiteError, closest
from slimtune.core.op import Op, changes
from slimtune.core.plan import Plan
from slimtune.core.scopes import Block, Held, last_open
from slimtune.core.stepping import watch

if TYPE_CHECKING:
    from slimtune.core.spec import Spec

BARE = Plan.of(None)
COPY = "(a copy)"  # stands among the unreached of a state that has been copied, until its model is seen to be the one that runs
_SCOPE: ContextVar[Mapping[Any, Block]] = ContextVar("slimtune_plans", default=MappingProxyType({}))


class Adapter:
    """A named set of ops.

    Attributes:
        name: its name on this model.
        spec: the recipe it was built from.
        ops: (module path, key in the slot) -> op.
        trainable: whether `use` may switch its gradients on.
        meta: facts from the file it was loaded from.
        steps: optimiser steps that a method which acts at them has seen; stays 0 for others.
        total_steps: how many there will be, once such a method has learnt it.
    """

    def __init__(self, name: str, spec: Spec, trainable: bool) -> None:
        self.name, self.spec, self.trainable = name, spec, trainable
        self.ops: dict[tuple[str, str], Op] = {}
        self.meta: dict[str, Any] = {}
        self.live = True  # whether its parameters require gradients now
        self.placed = False  # whether it has been put into a model, so that what requires no gradient has been frozen by the user
        self.frozen: set[tuple[str, str, str]] = set()  # (module path, key, parameter) that the user froze by hand while it was live
        self.steps = 0
        self.total_steps: int | None = None

    _holders: tuple[Any, list[dict[str, nn.Parameter | None]]] = (None, [])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_holders"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch(self)

    def parameters(self) -> Iterator[nn.Parameter]:
        for op in self.ops.values():
            yield from op.parameters()

    def set_live(self, live: bool) -> None:
        """Switch the gradients of this adapter's parameters; those that the user has frozen by hand stay frozen."""
        if live == self.live:
            return
        was, self.live, self.placed = self.live and self.placed, live, True
        params = self._flat()
        if not self.frozen and (not was or all([p.requires_grad for p in params])):
            for p in params:  # a server comes by here twice for each adapter and batch
                p.requires_grad = live
            return
        named = {(*at, name): p for at, op in self.ops.items() for name, p in op.named_parameters()}
        if was:
            self.frozen = {at for at, p in named.items() if not p.requires_grad}
        for at, p in named.items():
            p.requires_grad_(live and at not in self.frozen)

    def _flat(self) -> list[nn.Parameter]:
        """Return the parameters; which modules hold them is looked up again only when an op has changed."""
        key = (len(self.ops), changes())
        if self._holders[0] != key:
            self._holders = (key, [m._parameters for op in self.ops.values() for m in op.modules()])
        return [p for held in self._holders[1] for p in held.values() if p is not None]

    def thaw(self) -> None:
        """Forget what the user has frozen by hand, if that is all of it."""
        named = {(*at, name): p for at, op in self.ops.items() for name, p in op.named_parameters()}
        if self.live:
            self.frozen = {at for at, p in named.items() if not p.requires_grad}
        if self.frozen >= set(named):
            self.frozen, self.live = set(), False


class State:
    """Adapters and plans of one model."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.merged: list[Any] = []  # what unmerge undoes, newest last: see algebra.merge
        self.merged_plan: Plan | None = None
        self.latest = BARE  # what compiled code reads
        self.writes_over = False  # some module of the model writes over its input (inplace=True), so outputs cannot be kept for backward
        self.unreached: set[str] = set()  # modules with ops that no forward has called yet, until the first one of the whole model is over
        self.bypassed: set[str] = set()  # those that it did not call (see `core.reach`)
        self.routed: dict[str, str] = {}  # modules that see routed tokens -> their class, as far as known (see `core.rows`)
        self.scoped_grad = False  # a `with` block has run a forward that records gradients
        self.tasks: Tensor | None = None  # task of each row, said outside of any block (see `core.tasks`)
        self.block_tasks: Tensor | None = None  # the same, of the block entered last: what compiled code reads
        self._defaults: list[tuple[Plan, Any]] = [(BARE, None)]
        self._entered: list[Plan] = []
        self._init_runtime()

    def _init_runtime(self) -> None:
        self._lock = threading.Lock()
        self._held = Held()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in {"_lock", "_held"}}
        state["_defaults"], state["_entered"] = [(self.default, None)], []
        state["latest"], state["block_tasks"] = self.default, None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"routed": {}} | state)
        self.unreached = self.unreached | {COPY}
        self._init_runtime()

    # ---- the current plan ---------------------------------------------------------------------------------------
    @property
    def default(self) -> Plan:
        return self._defaults[-1][0]

    def current(self) -> Plan:
        """Return the plan in force here and now."""
        if torch.compiler.is_compiling():
            return self.latest
        block = self.block()
        if block is not None:
            self.scoped_grad = self.scoped_grad or torch.is_grad_enabled()
            return block.plan
        if self.scoped_grad and torch._C._current_graph_task_id() != -1:
            # A checkpointed region is being recomputed outside of the block it was first run in.
            raise PlanError(
                "a checkpointed forward is recomputed outside its `with st.use(...)` block, so its plan is unknown",
                hint="enable checkpointing with model.gradient_checkpointing_enable(), call st.keep_plan(model, torch.utils.checkpoint."
                "checkpoint) in its place, or call backward inside the block",
            )
        return self.default

    def set_default(self, plan: Plan, handle: Any) -> None:
        """Make `plan` the default; `handle` may still turn it into a block."""
        with self._lock:
            # An entry whose handle is gone can no longer become a block: what lies below the newest such entry is unreachable.
            settled = [i for i, (_, h) in enumerate(self._defaults) if h is None or h() is None]
            self._defaults = self._defaults[settled[-1] if settled else 0 :]
            self._defaults.append((plan, weakref.ref(handle)))
            self._refresh()

    def settle(self, plan: Plan) -> None:
        """Make `plan` the default, for good."""
        with self._lock:
            self._defaults = [(plan, None)]
            self._refresh()

    def in_block(self) -> bool:
        """Tell whether a `with` block of this model is open in this context."""
        return self.block() is not None

    def block(self) -> Block | None:
        """Return the block in force here and now."""
        block = _SCOPE.get().get(self)
        if block is not None and not block.open:
            block = last_open(block)
        return self._held.in_force(block) if self._held else block

    def withdraw(self, handle: Any) -> None:
        """Take back the default that `handle` set."""
        with self._lock:
            self._defaults = [(p, h) for p, h in self._defaults if h is None or h() is not handle] or [(BARE, None)]
            self._refresh()

    def enter(self, plan: Plan, frame: FrameType | None = None) -> Callable[[], None]:
        """Put `plan` into force in this context; the function returned takes it back, wherever it is called.

        Args:
            frame: of the generator that does so (see `core.scopes`).
        """
        block = Block(plan, last_open(_SCOPE.get().get(self)), self._held.on_stack() if self._held else None)
        _SCOPE.set({**_SCOPE.get(), self: block})
        with self._lock:
            if frame is not None:
                self._held.add(frame, block)
            self._entered.append(plan)
            self._refresh()

        def leave() -> None:
            block.open = False
            here = _SCOPE.get()
            if here.get(self) is block:
                before = last_open(block.before)
                _SCOPE.set({k: v for k, v in here.items() if k is not self} | ({} if before is None else {self: before}))
            with self._lock:
                if frame is not None:
                    self._held.drop(frame, block)
                for i in reversed(range(len(self._entered))):
                    if self._entered[i] is plan:
                        del self._entered[i]
                        break
                self._refresh()

        return leave

    def _refresh(self) -> None:
        self.latest = self._entered[-1] if self._entered else self.default

    # ---- adapters -----------------------------------------------------------------------------------------------
    def adapter(self, name: str) -> Adapter:
        """Return the adapter of this name.

        Raises:
            NoSuchAdapter: with the names there are.
        """
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise NoSuchAdapter(
                f"no adapter is called {name!r}", where=f"attached: {have}", hint=f"closest: {closest(name, self.adapters) or '-'}"
            )
        return self.adapters[name]

    def check(self, plan: Plan) -> None:
        """Raise unless every adapter of the plan exists."""
        for name in plan.names:
            self.adapter(name)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, torch.compile and the like.

    Raises:
        SiteError: this is no model.
    """
    if not isinstance(model, nn.Module):
        hint = "pass the model itself: st.attach and st.load change it in place, and return a report"
        raise SiteError(f"this is no model but a {type(model).__name__}", hint=hint)
    while True:
        inner = model._modules.get("_orig_mod") or (model._modules.get("module") if _is_wrapper(model) else None)
        if inner is None:
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__name__ in {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}


def state_of(model: nn.Module) -> State:
    """Return the state of a model.

    Raises:
        SiteError: nothing is attached to it, or it was attached to a part or a parent of it.
    """
    model = unwrap(model)
    state = model.__dict__.get("slim_state")
    if state is None:
        part = next((path for path, m in model.named_modules() if "slim_state" in m.__dict__), None)
        if part is not None:
            if part.split(".")[0] == "_fsdp_wrapped_module":
                raise SiteError(
                    "FullyShardedDataParallel holds a part of each tensor in each process, so this verb cannot act here",
                    where=type(model).__name__,
                    hint="st.save(model, folder), called by every process, gathers the adapter; attach, load and use before wrapping, or "
                    "shard with torch's fully_shard",
                )
            raise SiteError(f"the adapters sit on a part of this model: {part}", hint=f"pass that part: model.{part}")
        raise SiteError(f"nothing is attached to this {type(model).__name__}", hint="st.attach(model, st.LoRA()) or st.load(model, dir)")
    return state
