"""Tap: hands the input of one module to a host that runs later in the same forward (the input of a sub-block, to its last layer).

A tap is a forward pre-hook on the entrance, so the entrance need not be a host. It keeps the whole tensor, all rows, until the host takes it:
the host then cuts it by rows as it does its own input. Each thread has its own, a new forward overwrites what a failed one left behind,
and a checkpointed layer passes its entrance again when it is recomputed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SiteError

if TYPE_CHECKING:
    from slimtune.core.host import Slot


class Tap:
    """The hook on one entrance for one host's slot."""

    def __init__(self, slot: Slot, path: str) -> None:
        self.slot, self.path = slot, path
        self._held: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(name in self.slot._modules for name in self.slot.state.current().names):
            x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if isinstance(x, Tensor):
                self._held[_thread()] = x

    def take(self) -> Tensor | None:
        """Return the entrance's input in this forward, once; None if it has not run."""
        return self._held.pop(_thread(), None)

    def fit(self, module: nn.Module) -> None:
        """Put the hook onto the entrance."""
        module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self, model: nn.Module) -> None:
        """Take the hook off again."""
        module = model.get_submodule(self.path)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is self]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}


def tapped(far: dict[str, Tensor | None] | None, path: str, y: Tensor, host: nn.Module) -> Tensor:
    """Return the input that an op with an entrance reads.

    Args:
        far: entrance -> its input for the rows at hand.
        y: the host's output, for the same tokens.

    Raises:
        SiteError: the entrance has not run before its host, or on other tokens.
    """
    x = None if far is None else far.get(path)
    where = host.slim.path  # type: ignore[union-attr]
    if x is None:
        raise SiteError(
            f"this {type(host).__name__} ran without {path}, whose input the adapter reads",
            where=str(where),
            hint="name a module that holds both of them in targets=, or use an adapter that reads the output (st.Bottleneck)",
        )
    if x.shape[:-1] != y.shape[:-1]:
        raise SiteError(
            f"the input of {path} {list(x.shape)} and the output here {list(y.shape)} are not of the same tokens",
            where=str(where),
            hint="use an adapter that reads the output (st.Bottleneck)",
        )
    return x


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
