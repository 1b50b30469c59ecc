"""Putting merged values into a module so that the very old objects can come back.

New Parameter objects are installed beside the old ones, which are kept: unmerge restores the same bits, and a weight tied to another
module is not changed for that other module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimtune.core.errors import MergeError
from slimtune.core.fresh import LOADED


class Exchange:
    """Holds the parameters that are not in place now; each call exchanges them with those that are."""

    def __init__(self, module: nn.Module, aside: dict[str, Tensor | None]) -> None:
        self.module, self.aside = module, aside
        self.scale: dict[str, float] = {}  # by what both have been scaled since they were made (see `algebra.follow`)
        self.placed: dict[str, tuple[Tensor | None, int | None]] = {}  # the tensors in place and their versions, when they were put there

    def __call__(self) -> None:
        for name, value in self.aside.items():
            table: dict[str, Any] = self.module._buffers if name in self.module._buffers else self.module._parameters
            self.aside[name], table[name] = table.get(name), value
        self.placed = {name: (self.here(name), _version(self.here(name))) for name in self.aside}

    def here(self, name: str) -> Tensor | None:
        """Return the tensor that is in place."""
        return self.module._buffers[name] if name in self.module._buffers else self.module._parameters.get(name)

    def changed(self) -> list[str]:
        """Return the names of tensors that somebody has written to since they were put in place.

        What another exchange has put there since (projections of one attention share a bias) is for that one to answer.
        """
        return [n for n, (t, version) in self.placed.items() if version is not None and self.here(n) is t and _version(t) != version]


def _version(t: Tensor | None) -> int | None:
    return None if t is None or t.is_inference() else t._version


def install(module: nn.Module, **values: Tensor | None) -> Exchange:
    """Replace parameters of `module` (None = leave); calling the result puts the old objects back."""
    new: dict[str, Tensor | None] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in module._buffers:  # as torch leaves a frozen weight when its parametrization is removed
            held = module._buffers[name]
            new[name] = value.detach() if held is None else value.detach().to(device=held.device, dtype=held.dtype)
            continue
        if name not in module._parameters:
            raise MergeError(
                f"{name!r} of this {type(module).__name__} is computed anew for each forward, so nothing can be merged into it",
                where=getattr(module._modules.get("slim"), "path", ""),
                hint=f"make it a plain weight first: torch.nn.utils.{_removal(module, name)}",
            )
        if isinstance(value, nn.Parameter):  # a quantised parameter made by its own library
            new[name] = value
            continue
        before = module._parameters.get(name)
        like = before if before is not None else next(iter(module.parameters(recurse=False)))
        dtype = like.dtype if like.is_floating_point() else value.dtype  # a new bias beside packed codes
        new[name] = nn.Parameter(value.detach().to(device=like.device, dtype=dtype), requires_grad=False)
        if before is not None and LOADED in before.__dict__:
            setattr(new[name], LOADED, before.__dict__[LOADED])
    exchange = Exchange(module, new)
    exchange()
    return exchange


def _removal(module: nn.Module, name: str) -> str:
    """Return the call that makes a computed weight a plain one."""
    if f"{name}_mask" in module._buffers:
        return f"prune.remove(module, {name!r})"
    if f"{name}_g" in module._parameters:
        return f"remove_weight_norm(module, {name!r})"
    if f"{name}_orig" in module._parameters:
        return f"remove_spectral_norm(module, {name!r})"
    return f"parametrize.remove_parametrizations(module, {name!r})"
