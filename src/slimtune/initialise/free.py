"""Random initialisers: B A = 0, so the output is unchanged without a frozen part."""

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
Check: TypeAlias = "Callable[[Site, Any], list[str]]"
INITS: dict[str, Initialiser] = {}
CHECKS: dict[str, Check] = {}


def initialiser(name: str, check: Check | None = None) -> Callable[[Initialiser], Initialiser]:
    """Register an initialiser under the name that `LoRA(init=...)` takes.

    Args:
        name: of the initialiser.
        check: (site, spec) -> what stops it from working at a site.
    """

    def wrap(fn: Initialiser) -> Initialiser:
        INITS[name] = fn
        if check is not None:
            CHECKS[name] = check
        return fn

    return wrap


def init_problems(name: str, site: Site, spec: Any) -> list[str]:
    """Return what stops the named initialiser from working at a site."""
    return CHECKS[name](site, spec) if name in CHECKS else []


def initialise(name: str, op: LoRAOp, site: Site, spec: Any) -> None:
    """Start an op's factors by the named initialiser."""
    with torch.no_grad():
        INITS[name](op, site, spec)
        pad = site.module.__dict__.get("padding_idx") if site.kind.name == "embedding" else None
        if pad is not None:  # that row gets no gradient either, so it stays as it is
            for A in (op.A, op.A0):
                if A is not None:
                    A[:, pad] = 0


@initialiser("kaiming")
def kaiming(op: LoRAOp, site: Site, spec: Any) -> None:
    """A uniform by Kaiming with a = sqrt(5), B zero; on embeddings A zero and B normal (as the reference library), unless A is frozen."""
    if site.kind.name == "embedding" and "A" in op._parameters:
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


@initialiser("orthogonal")
def orthogonal(op: LoRAOp, site: Site, spec: Any) -> None:
    """A and B random, within two halves of a random orthogonal basis of the rank space, so that B A = 0 although neither is zero.

    With Q [r, r] orthogonal: A = Q_even^T N_A / 10, B = N_B Q_odd / 10, N normal; Q_even, Q_odd its rows 0, 2, .. and 1, 3, ..
    Source: the reference library (which takes even ranks only).
    """
    G, m, k = site.kind.matrices(torch.empty(site.shape, device="meta"), site.module).shape
    q = site.kind.inner_rank(site.module, op.r)
    new: dict[str, Any] = {"device": op.A.device, "dtype": torch.float64 if op.A.dtype == torch.float64 else torch.float32}
    As, Bs = [], []
    for _ in range(G):
        Q = torch.linalg.qr(torch.randn(q, q, **new))[0]
        even, odd = Q[0::2], Q[1::2]
        As.append(even.T @ torch.randn(even.shape[0], k, **new) / 10)  # [q, q/2] @ [q/2, k]
        Bs.append(torch.randn(m, odd.shape[0], **new) @ odd / 10)  # [m, q/2] @ [q/2, q]
    op.start_from(*site.kind.pack(torch.stack(As), torch.stack(Bs), site.shape), frozen=False)
