"""Putting merged values into a module so that the very old objects can come back.

New Parameter objects are installed beside the old ones, which are kept: unmerge restores the same bits, and a weight tied to another
module is not changed for that other module.
"""

from __future__ import annotations

from torch import Tensor, nn

from slimtune.core.errors import MergeError
from slimtune.core.fresh import LOADED


class Exchange:
    """Holds the parameters that are not in place now; each call exchanges them with those that are."""

    def __init__(self, module: nn.Module, aside: dict[str, nn.Parameter | None]) -> None:
        self.module, self.aside = module, aside

    def __call__(self) -> None:
        for name, value in self.aside.items():
            self.aside[name], self.module._parameters[name] = self.module._parameters.get(name), value


def install(module: nn.Module, **values: Tensor | None) -> Exchange:
    """Replace parameters of `module` (None = leave); calling the result puts the old objects back."""
    new: dict[str, nn.Parameter | None] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in module._parameters:
            raise MergeError(
                f"{name!r} of this {type(module).__name__} is computed (by a parametrization or weight norm), so nothing can be merged into it",
                where=getattr(module._modules.get("slim"), "path", ""),
                hint="remove the parametrization first: torch.nn.utils.parametrize.remove_parametrizations",
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
