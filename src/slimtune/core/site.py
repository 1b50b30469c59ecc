"""Site: where an op sits: a module path, a port, and one weight of the module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.elsewhere import at_hand, device_of
from slimtune.core.kind import Kind


@dataclass(frozen=True)
class Site:
    """One place of a model that can carry an op.

    Args:
        path: dotted module path ("" = the model itself).
        port: "weight", "input" or "output".
        kind: how the module computes.
        module: the module; ops must not keep it.
        param: name of the weight ("weight", "gate_up_proj", ...).
        shape: canonical shape of the weight ([b, a], [b, a/groups, *k], ...), () for ports without one.
        dtype: of the op's parameters.
        blank: a file's tensors will overwrite the op: initialisers may be skipped.
        loading: the op is being filled from a file: what only training needs may be left out.
        shared: tensors that all ops of one adapter share, by name, filled by the first op that needs them.
        entrance: where the op takes its input x, if not at this module: see `at_entrance`.
    """

    path: str
    port: str
    kind: Kind
    module: nn.Module = field(repr=False, compare=False)
    param: str = "weight"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    blank: bool = False
    loading: bool = False
    shared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    entrance: Site | None = field(default=None, repr=False, compare=False)

    @property
    def a(self) -> int:
        """Inputs of the map, or of the entrance."""
        if self.entrance is not None:
            return self.entrance.a
        return self.kind.widths(self.module, self.param)[0]

    @property
    def b(self) -> int:
        """Outputs of the map; of the whole module (its last weight) at the output port."""
        last = self.kind.names(self.module)[-1:] if self.port == "output" else ()
        return self.kind.widths(self.module, last[0] if last else self.param)[1]

    @property
    def device(self) -> torch.device:
        """Where the module computes, wherever its weights are kept between forwards."""
        return device_of(self.module)

    def at_entrance(self, path: str, module: nn.Module, kind: Kind) -> Site:
        """Return this site with x taken from the input of another module, which runs before this one in the same forward."""
        param = next(iter(kind.names(module)), "weight")
        return replace(self, entrance=Site(path=path, port="input", kind=kind, module=module, param=param))

    def for_build(self, dtype: torch.dtype | None, blank: bool, shared: dict[str, Any], loading: bool = False) -> Site:
        """Return this site with what an op needs to know while it is built.

        Args:
            dtype: wanted, or None: the base's own, but float32 on a half-precision or quantised base.
        """
        own = self.module._parameters.get(self.param)
        if own is None:
            own = next(self.module.parameters(), None)
        if dtype is None:
            dtype = own.dtype if own is not None and own.dtype in (torch.float32, torch.float64) else torch.float32
        return replace(self, dtype=dtype, blank=blank or self.device.type == "meta", loading=loading, shared=shared)

    def read(self) -> Tensor:
        """Return the dense base weight in canonical shape."""
        with at_hand(self.module):
            return self.kind.read(self.module, self.param)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "-"
        name = self.path or "(the model)"
        suffix = "" if self.param == "weight" else f".{self.param}"
        return f"{name}{suffix} ({type(self.module).__name__} {shape}, port {self.port})"
