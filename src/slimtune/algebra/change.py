"""Change: what ops do to one weight, dW = W' - W and db = b' - b, in the smallest exact form.

A weight is seen as its stack of matrices [G, m, k] (`Kind.matrices`). A change is

    pair     A [G, q, k], B [G, m, q]   dW = B A            ops whose deltas have factors
    pieces   i -> [g, m, k]             dW, piece by piece   anything else; experts one matrix at a time, so all are never formed at once

Differences from the base (ops that multiply W) are taken in float64: W' and W share most of their digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError
from slimtune.core.op import Additive, Op, affine
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.site import Site
from slimtune.core.state import Adapter
from slimtune.ports.effective import effective

Pair = tuple[Tensor, Tensor]
Pieces = Callable[[int], Tensor]


@dataclass
class Change:
    """The change of one weight and its bias.

    Attributes:
        site: the weight.
        pair: (A, B), or None.
        pieces: the dense change piece by piece where there is no pair; both None: the weight stays as it is.
        bias: db [b], or None.
    """

    site: Site
    pair: Pair | None = None
    pieces: Pieces | None = None
    bias: Tensor | None = None

    @property
    def moves(self) -> bool:
        """Whether the weight changes."""
        return self.pair is not None or self.pieces is not None

    @property
    def count(self) -> int:
        """Number of pieces."""
        return self.site.shape[0] if self.site.kind.name == "experts" else 1

    def piece(self, i: int) -> Tensor:
        """Return piece i of dW as matrices [g, m, k]."""
        if self.pair is not None:
            A, B = (t[i : i + 1] for t in self.pair) if self.count > 1 else self.pair
            return B @ A
        assert self.pieces is not None, "the weight does not change"
        return self.pieces(i)

    def write(self, out: Tensor) -> float:
        """Write dW into a tensor of canonical shape, piece by piece, and return its norm."""
        stack = self.site.kind.matrices(out, self.site.module)  # a view
        squares = 0.0
        for i in range(self.count):
            piece = self.piece(i)
            stack[i : i + 1 if self.count > 1 else None].copy_(piece)
            squares += float(piece.double().square().sum())
        return squares**0.5


def added(changes: Sequence[tuple[Change, float]]) -> Change:
    """Return the weighted sum of changes of one weight: factors side by side where all have them, else dense."""
    site = changes[0][0].site
    moving = [(c, w) for c, w in changes if c.moves]
    biases = [w * c.bias for c, w in changes if c.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if moving and all(c.pair is not None for c, _ in moving):
        A = torch.cat([c.pair[0] for c, _ in moving], 1)  # type: ignore[index]
        B = torch.cat([w * c.pair[1] for c, w in moving], 2)  # type: ignore[index]
        return Change(site, pair=(A, B), bias=bias)

    def pieces(i: int) -> Tensor:
        total = moving[0][1] * moving[0][0].piece(i)
        for c, w in moving[1:]:
            total += w * c.piece(i)
        return total

    return Change(site, pieces=pieces if moving else None, bias=bias)


def extents(site: Site) -> tuple[int, int, int]:
    """Return (G, m, k) of a weight's matrices."""
    G, m, k = site.kind.matrices(torch.empty(site.shape, device="meta"), site.module).shape
    return G, m, k


def site_at(model: nn.Module, path: str, param: str) -> Site:
    """Return the weight site of a module that carries ops or may carry them."""
    module = model.get_submodule(path)
    kind = kind_at(module)
    return Site(path=path, port="weight", kind=kind, module=module, param=param, shape=kind.shape(module, param))


def places(model: nn.Module, adapters: Sequence[Adapter]) -> list[tuple[str, str]]:
    """Return (path, param) of every weight that the adapters act on, in the order of the model."""
    found = {(path, op.param) for adapter in adapters for (path, _), op in adapter.ops.items()}
    order = {path: i for i, path in enumerate(base_modules(model))}
    return sorted(found, key=lambda at: (order[at[0]], at[1]))


def ops_at(adapter: Adapter, path: str, param: str) -> list[Op]:
    """Return an adapter's ops on one weight, in the order in which they act."""
    return [op for (p, _), op in adapter.ops.items() if p == path and op.param == param]


def check_affine(adapter: Adapter, doing: str) -> None:
    """Raise unless every op of an adapter is a change of weights.

    Args:
        doing: what was asked for ("combined", "converted").

    Raises:
        CapabilityError: with the first op that is not.
    """
    for (path, _), op in adapter.ops.items():
        if not affine(op):
            raise CapabilityError(
                f"{adapter.name!r} cannot be {doing}: {type(op).__name__} is no affine map of its input, so no change of a weight equals it",
                where=f"{path or '(the model)'} (method {op.method or adapter.spec.method})",
                hint="run it beside others instead: st.use(model, [...]) stacks adapters of any method",
            )


def change_of(site: Site, ops: Sequence[Op]) -> Change:
    """Return what ops, one after the other, do to a weight."""
    movers: list[Any] = [op for op in ops if hasattr(op, "weight")]
    with torch.no_grad():
        if all(isinstance(op, Additive) for op in movers):
            return _sum_of_deltas(site, movers, _bias_of(site, ops))
        return _difference(site, ops)


def _sum_of_deltas(site: Site, movers: Sequence[Any], bias: Tensor | None) -> Change:
    parts: list[tuple[Change, float]] = []
    for op in movers:
        pair = op.pair()
        found = Change(site, pieces=_pieces_of(site, op)) if pair is None else Change(site, pair=stacked(site, *pair))
        if found.pair is None or found.pair[0].shape[1]:  # a rank of 0 (all pruned away) is no change
            parts.append((found, 1.0))
    total = added(parts) if parts else Change(site)
    total.bias = bias
    return total


def stacked(site: Site, A: Tensor, B: Tensor) -> Pair:
    """Return factors as stacks A [G, q, k] and B [G, m, q]."""
    G, m, k = extents(site)
    q = B.numel() // (G * m)
    if A.numel() != G * q * k:
        site.kind.compose(A, B, site.shape)  # factors in a foreign layout that no weight equals: its error says so
    return _work(A.detach()).reshape(G, q, k), _work(B.detach()).reshape(G, m, q)


def _pieces_of(site: Site, op: Any) -> Pieces:
    if site.kind.name == "experts":
        return lambda i: _work(op.delta_of(i) if hasattr(op, "delta_of") else op.delta()[i]).detach()[None]
    return lambda i: _work(site.kind.matrices(op.delta(), site.module)).detach()


def _difference(site: Site, ops: Sequence[Op]) -> Change:
    """Return the change made by ops that transform the weight they find."""
    b = site.kind.bias(site.module, site.param)
    work = torch.float64 if any(p.dtype == torch.float64 for op in ops for p in op.parameters()) else torch.float32
    chain = [[(op, None)] for op in ops]

    def both() -> tuple[Tensor, Tensor | None, Tensor]:
        W = site.read().detach().double()
        after, b_after = effective(W, None if b is None else b.detach().double(), chain, site.module)  # type: ignore[arg-type]
        return after, b_after, W

    def pieces(i: int) -> Tensor:
        with torch.no_grad():
            after, _, W = both()
            stack = site.kind.matrices((after - W).to(work), site.module)
            return stack[i : i + 1] if site.kind.name == "experts" else stack

    return Change(site, pieces=pieces, bias=_bias_of(site, ops))


def _bias_of(site: Site, ops: Sequence[Any]) -> Tensor | None:
    """Return the change of the bias, None where there is none."""
    own = site.kind.bias(site.module, site.param)
    before = now = None if own is None else own.detach().double()
    for op in ops:
        if hasattr(op, "bias"):
            new = op.bias(now)
            now = now if new is None else new.detach().double()
    if now is None or now is before:
        return None
    change = now if before is None else now - before
    wide = any(p.dtype == torch.float64 for op in ops for p in op.parameters())
    return change.to(torch.float64 if wide else torch.float32) if bool(change.any()) else None


def _work(t: Tensor) -> Tensor:
    """Return a tensor in the type that algebra is done in: float32, or its own float64."""
    return t if t.dtype == torch.float64 else t.float()
