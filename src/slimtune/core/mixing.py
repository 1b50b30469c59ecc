"""Classes made on the fly: a module gets mixins in front of its own class, and its very first class back when the last one goes.

`module.__class__ = hosted(type(module), ...)`: names, isinstance checks and state-dict keys do not move, and any quantised layer works
since its own forward is what runs. The classes are rebuilt on unpickling, so pickle and deepcopy work. Classes that torch makes on the fly
itself (parametrizations, fully_shard) are shells: they stay outermost, since torch takes them off by their bases.

A mixin says by `rank` where it stands among others, by `slim_suits(base)` which classes it is for (all, if it does not say), and by
`keeps_signature` that its forward must look like the base's. One that has a forward is reached whatever stands on the instance: see `patched`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from slimtune.core.patched import FORWARDS, Patched, assign, release, settle

_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}
_OWN = {"__dict__", "__weakref__", "__slotnames__", "slim_shell"}  # of a class itself
_SHELLS = ("torch.nn.utils.parametrize", "torch.distributed.fsdp.", "torch.distributed._composable.")


def hosted(base: type, mixins: tuple[type, ...]) -> type:
    """Return the subclass of `base` with `mixins` in front, made once."""
    key = (base, mixins)
    if key not in _CLASSES:
        body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body |= {"slim_base": base, "slim_mixins": mixins, "slim_patched": Patched in mixins, "__reduce_ex__": _reduce_ex}
        cls = type(base.__name__, (*mixins, base), body)
        if _forwards(mixins):
            cls.__setattr__, cls.__delattr__ = _watched(cls)  # type: ignore[assignment, method-assign]
            FORWARDS.update(m.__dict__["forward"] for mixin in mixins for m in mixin.__mro__ if "forward" in m.__dict__)
        if any(getattr(m, "keeps_signature", False) for m in mixins):
            cls.forward = _signed(cls, base)  # type: ignore[attr-defined]
            FORWARDS.add(cls.forward)  # type: ignore[attr-defined]
        _CLASSES[key] = cls
    return _CLASSES[key]


def _forwards(mixins: tuple[type, ...]) -> bool:
    return any(hasattr(m, "forward") for m in mixins if m is not Patched)


def _signed(cls: type, base: type) -> Callable[..., Any]:
    """Return a forward with the signature of the base's: trainers read from it which columns a model takes."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(cls, self).forward(*args, **kwargs)  # type: ignore[arg-type, misc]

    return forward


def _watched(cls: type) -> tuple[Callable[[Any, str, Any], None], Callable[[Any, str], None]]:
    """Return setters of attributes that keep the forward of the class in force when somebody sets one on the instance."""

    def setter(self: Any, name: str, value: Any) -> None:
        if name != "forward":
            super(cls, self).__setattr__(name, value)  # type: ignore[misc, arg-type]
        else:
            _patch(self, assign(self, value))

    def deleter(self: Any, name: str) -> None:
        if name != "forward":
            super(cls, self).__delattr__(name)  # type: ignore[misc, arg-type]
        elif "forward" in self.__dict__:
            del self.__dict__["forward"]
        else:
            self.__dict__.pop("slim_own", None)
            _patch(self, False)

    return setter, deleter


def specialise(module: nn.Module, mixin: type) -> None:
    """Add a mixin to the class of one module."""
    base, mixins = _parts(module)
    if mixin in mixins or (hasattr(mixin, "slim_suits") and not mixin.slim_suits(base)):
        return
    _give(module, base, (*mixins, mixin))
    if hasattr(mixin, "forward"):
        _patch(module, settle(module))


def generalise(module: nn.Module, mixin: type) -> None:
    """Take a mixin away again; without any left the module has its very first class."""
    base, mixins = _parts(module)
    if mixin not in mixins:
        return
    left = tuple(m for m in mixins if m is not mixin)
    if _forwards(left) or not _forwards(mixins):
        _give(module, base, left)
        if _forwards(left):
            settle(module)
        return
    _give(module, base, tuple(m for m in left if m is not Patched))
    release(module)


def base_class(module: nn.Module) -> type:
    """Return the class a module had before anything was attached, without what torch put around it."""
    return _parts(module)[0]


def _parts(module: nn.Module) -> tuple[type, tuple[type, ...]]:
    cls = _core(type(module))
    return (cls.slim_base, cls.slim_mixins) if "slim_mixins" in cls.__dict__ else (cls, ())  # type: ignore[attr-defined]


def _give(module: nn.Module, base: type, mixins: tuple[type, ...]) -> None:
    new = hosted(base, tuple(sorted(mixins, key=lambda m: m.rank))) if mixins else base  # type: ignore[attr-defined]
    module.__class__ = _reshelled(type(module), new)


def _patch(module: nn.Module, needed: bool) -> None:
    """Have `Patched` among the mixins of a module, or not."""
    base, mixins = _parts(module)
    if needed != (Patched in mixins):
        _give(module, base, (*mixins, Patched) if needed else tuple(m for m in mixins if m is not Patched))
        settle(module)


def _core(cls: type) -> type:
    """Return what is inside of the shells of a class."""
    while cls.__module__.startswith(_SHELLS) and "slim_mixins" not in cls.__dict__ and (inner := _inner(cls)) is not None:
        cls = inner
    return cls


def _inner(cls: type) -> type | None:
    """Return the class that a shell was put around; torch's own modules, such as FullyShardedDataParallel, are none."""
    made = cls.__name__.startswith("Parametrized") or any(b.__name__ == "FSDPModule" for b in cls.__bases__)
    return next((b for b in cls.__bases__ if issubclass(b, nn.Module)), None) if made else None


def _reshelled(cls: type, core: type) -> type:
    """Return the shells of a class around another core."""
    old = _core(cls)
    if cls is old:
        return core
    inner = _inner(cls)
    bases = tuple(_reshelled(b, core) if b is inner else b for b in cls.__bases__)
    body = {k: v for k, v in cls.__dict__.items() if k not in _OWN}
    first: type = cls.__dict__.get("slim_shell", cls)  # as torch made it
    if first.__bases__ == bases and not (set(body) ^ set(first.__dict__)) - _OWN:
        return first
    return type(cls.__name__, bases, {**body, "slim_shell": first})


def _blank(base: type, mixins: tuple[type, ...]) -> nn.Module:
    cls = hosted(base, mixins)
    made: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    return made


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    cls = type(self)
    reduced = object.__reduce_ex__(self, 2)
    state = reduced[2] if len(reduced) > 2 else self.__dict__
    return _blank, (cls.slim_base, cls.slim_mixins), state  # type: ignore[attr-defined]
