"""Forwards that stand on the instance: `module.forward = ...` hides the forward of the class, and with it everything that a mixin does.

accelerate does it to every module of a dispatched model (its hooks put the weights in place around `module._old_forward`); Liger, unsloth
and many a notebook do it to put code of their own there. So whenever a class changes, and whenever somebody sets `forward` afterwards:

    what is set calls our forward (captured before)   it stays outermost
    accelerate's hooks, older than the adapter        stay outermost, and find our forward in `_old_forward`
    anything else                                     is kept in `slim_own` and becomes the innermost: our forward goes around it

Whoever holds our forward in an attribute of the module is given the class's again when the last mixin goes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from slimtune.core.errors import SiteError

FORWARDS: set[Callable[..., Any]] = set()  # the forward of every mixin, and of every class made of them
_RUNNING = threading.local()  # the modules whose own forward this thread is in
_LIMIT = 64  # callables looked into, to see whether one leads to our forward


class Patched:
    """Mixin of a module whose own forward stands on the instance: the others go around it."""

    rank = 99

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["slim_own"](self, *args, **kwargs)


class Own:
    """A forward that somebody put onto a module; bound methods are kept unbound, so that copies of the module call theirs."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.bound = isinstance(forward, MethodType) and forward.__self__ is module
        self.forward: Any = forward.__func__ if self.bound else forward  # type: ignore[attr-defined]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._call(module, args, kwargs)
        inside = _RUNNING.__dict__.setdefault("modules", set())
        if id(module) in inside:
            raise SiteError(
                f"the function set as `forward` of this {type(module).__name__} calls the forward that holds the adapters, which calls it again",
                where=str(getattr(module._modules.get("slim"), "path", "")),
                hint="keep the forward that it calls in a local variable or an attribute of the module, or use register_forward_hook",
            )
        inside.add(id(module))
        try:
            return self._call(module, args, kwargs)
        finally:
            inside.discard(id(module))

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.forward(module, *args, **kwargs) if self.bound else self.forward(*args, **kwargs)

    def on(self, module: nn.Module) -> Callable[..., Any]:
        """Return it as it stood on the instance."""
        return MethodType(self.forward, module) if self.bound else self.forward


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that stands on the instance in place of its class's forward, seen through accelerate's hooks, or None."""
    if "slim_own" in module.__dict__:
        return module.__dict__["slim_own"].on(module) if _hides(module) else None
    forward = module.__dict__.get("_old_forward" if _hooked(module) else "forward")
    return None if forward is None or _of_class(forward, module) or leads(forward, module) else forward


def settle(module: nn.Module) -> bool:
    """Make a call of the module reach the forward of its class, which has just changed; tell whether `Patched` is needed for that."""
    held = module.__dict__
    for name, value in list(held.items()):
        if _ours(value, module):
            held[name] = MethodType(type(module).forward, module)
    forward = held.get("forward")
    if forward is None or leads(forward, module):
        return _hides(module)
    if _hooked(module):
        forward, held["_old_forward"] = held["_old_forward"], MethodType(type(module).forward, module)
    else:
        del held["forward"]
    held["slim_own"] = Own(module, forward)
    return _hides(module)


def release(module: nn.Module) -> None:
    """Put everything back that `settle` moved, and take our forward from whoever holds it; the module has no mixin any more."""
    held = module.__dict__
    own: Own | None = held.pop("slim_own", None)
    forward = MethodType(type(module).forward, module) if own is None else own.on(module)
    for name, value in list(held.items()):
        if _ours(value, module):
            held[name] = forward
    if own is not None and "forward" not in held:
        held["forward"] = forward


def assign(module: nn.Module, forward: Any) -> bool:
    """Take in what somebody sets as `forward` of a module with mixins; tell whether `Patched` is needed now."""
    held = module.__dict__
    held.pop("forward", None)
    if _ours(forward, module):  # a wrapper has been taken off again
        return _hides(module)
    if leads(forward, module):
        held["forward"] = forward
    else:
        held["slim_own"] = Own(module, forward)
    return _hides(module)


def leads(forward: Any, module: nn.Module) -> bool:
    """Tell whether a callable holds our forward of this module: in a closure, in its arguments, or in an attribute that its code names."""
    todo: list[Any] = [forward]
    seen: set[int] = set()
    while todo and len(seen) < _LIMIT:
        f = todo.pop()
        if id(f) in seen or not callable(f) or isinstance(f, (nn.Module, type)):
            continue
        seen.add(id(f))
        if f in FORWARDS if isinstance(f, FunctionType) else _ours(f, module):
            return True
        todo += _inside(f, module)
    return False


def _inside(f: Any, module: nn.Module) -> list[Any]:
    if isinstance(f, MethodType):
        return [f.__func__]
    if isinstance(f, functools.partial):
        return [f.func, *f.args, *f.keywords.values()]
    if not isinstance(f, FunctionType):
        return [v for k, v in getattr(f, "__dict__", {}).items() if k != "__wrapped__"]  # wraps() alone does not say that it is called
    cells = []
    for cell in f.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    names = [n for n in _names(f.__code__) if n != "forward"]
    named = [held[n] for n in names for held in (module.__dict__, f.__globals__) if n in held]
    return [*cells, *(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values(), *named]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _ours(value: Any, module: nn.Module) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ in FORWARDS


def _of_class(value: Any, module: nn.Module) -> bool:
    """Tell whether a value is the bound forward of a class of the module, which hides nothing."""
    if not isinstance(value, MethodType) or value.__self__ is not module:
        return False
    return any(cls.__dict__.get("forward") is value.__func__ for cls in type(module).__mro__)


def _hides(module: nn.Module) -> bool:
    """Tell whether what stood on the instance is not just the forward of its class."""
    own: Own | None = module.__dict__.get("slim_own")
    return own is not None and not _of_class(own.on(module), module)


def _hooked(module: nn.Module) -> bool:
    """Tell whether `forward` is accelerate's, which calls whatever `_old_forward` holds then."""
    forward = module.__dict__.get("forward")
    called = forward.func if isinstance(forward, functools.partial) else None
    return "_old_forward" in module.__dict__ and getattr(called, "__module__", "") == "accelerate.hooks"
