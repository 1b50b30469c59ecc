"""Random initialisers: B = 0, so the output is unchanged whatever A is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from slimtune.core.site import Site
    from slimtune.methods.lora import LoRAOp

Initialiser: TypeAlias = "Callable[[LoRAOp, Site, Any], None]"
INITS: dict[str, Initialiser] = {}


def initialiser(name: str) -> Callable[[Initialiser], Initialiser]:
    """Register an initialiser under the name that `LoRA(init=...)` takes."""

    def wrap(fn: Initialiser) -> Initialiser:
        INITS[name] = fn
        return fn

    return wrap


def initialise(name: str, op: LoRAOp, site: Site, spec: Any) -> None:
    """Start an op's factors by the named initialiser."""
    with torch.no_grad():
        INITS[name](op, site, spec)


@initialiser("kaiming")
def kaiming(op: LoRAOp, site: Site, spec: Any) -> None:
    """A uniform by Kaiming with a = sqrt(5), B zero; on embeddings A zero and B normal (as the reference library)."""
    if site.kind.name == "embedding":
        nn.init.zeros_(op.A)
        nn.init.normal_(op.B)
        return
    nn.init.kaiming_uniform_(op.A.view(-1, *op.A.shape[-1:]) if site.kind.name == "experts" else op.A, a=math.sqrt(5))
    nn.init.zeros_(op.B)


@initialiser("gaussian")
def gaussian(op: LoRAOp, site: Site, spec: Any) -> None:
    """A normal with deviation 1 / r, B zero."""
    nn.init.normal_(op.A, std=1.0 / op.r)
    nn.init.zeros_(op.B)
