"""Classes made on the fly: a module gets mixins in front of its own class, and its very first class back when the last one goes.

`module.__class__ = hosted(type(module), ...)`: names, isinstance checks and state-dict keys do not move, and any quantised layer works
since its own forward is what runs. The classes are rebuilt on unpickling, so pickle and deepcopy work.

A mixin says by `rank` where it stands among others, by `slim_suits(base)` which classes it is for (all, if it does not say), and by
`keeps_signature` that its forward must look like the base's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}


def hosted(base: type, mixins: tuple[type, ...]) -> type:
    """Return the subclass of `base` with `mixins` in front, made once."""
    key = (base, mixins)
    if key not in _CLASSES:
        body: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body |= {"slim_base": base, "slim_mixins": mixins, "__reduce_ex__": _reduce_ex}
        cls = type(base.__name__, (*mixins, base), body)
        if any(getattr(m, "keeps_signature", False) for m in mixins):
            cls.forward = _signed(cls, base)  # type: ignore[attr-defined]
        _CLASSES[key] = cls
    return _CLASSES[key]


def _signed(cls: type, base: type) -> Callable[..., Any]:
    """Return a forward with the signature of the base's: trainers read from it which columns a model takes."""

    @functools.wraps(base.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(cls, self).forward(*args, **kwargs)  # type: ignore[arg-type, misc]

    return forward


def specialise(module: nn.Module, mixin: type) -> None:
    """Add a mixin to the class of one module."""
    base, mixins = type(module), ()
    if "slim_mixins" in base.__dict__:
        base, mixins = base.slim_base, base.slim_mixins  # type: ignore[attr-defined]
    if mixin in mixins:
        return
    wanted = tuple(sorted((*mixins, mixin), key=lambda m: m.rank))  # type: ignore[attr-defined]
    if hasattr(mixin, "slim_suits") and not mixin.slim_suits(base):
        return
    module.__class__ = hosted(base, wanted)


def generalise(module: nn.Module, mixin: type) -> None:
    """Take a mixin away again; without any left the module has its very first class."""
    cls = type(module)
    if "slim_mixins" not in cls.__dict__:
        return
    left = tuple(m for m in cls.slim_mixins if m is not mixin)  # type: ignore[attr-defined]
    base = cls.slim_base  # type: ignore[attr-defined]
    module.__class__ = hosted(base, left) if left else base


def base_class(module: nn.Module) -> type:
    """Return the class a module had before anything was attached."""
    cls = type(module)
    return cls.slim_base if "slim_mixins" in cls.__dict__ else cls  # type: ignore[attr-defined]


def _blank(base: type, mixins: tuple[type, ...]) -> nn.Module:
    cls = hosted(base, mixins)
    made: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    return made


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    cls = type(self)
    reduced = object.__reduce_ex__(self, 2)
    state = reduced[2] if len(reduced) > 2 else self.__dict__
    return _blank, (cls.slim_base, cls.slim_mixins), state  # type: ignore[attr-defined]
