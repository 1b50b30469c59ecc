"""The one fold: y = base(x), then each op of the chain over y. Every feature of every method runs through these functions.

A chain is a stack of links, innermost first; a link is a weighted sum of ops. In weight terms a link maps W to
W + sum_i w_i (T_i(W) - W), and links compose, so the fold below equals the merged weight for every affine op. An op that
changes the module's input (`enter`) multiplies W from the right: it acts on what the links before it see, not on those after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError
from slimtune.core.op import Op
from slimtune.core.tap import tapped

Link: TypeAlias = list[tuple[Op, Tensor | None]]
Chain: TypeAlias = list[Link]
Part: TypeAlias = tuple[slice | Tensor, Chain]
Far: TypeAlias = dict[str, Tensor | None] | None  # entrance -> its input, for ops that do not read their own module's


def entering(host: nn.Module, x: Tensor, chain: Chain) -> tuple[list[Tensor], Tensor]:
    """Return the input each link sees, and the input the base sees."""
    seen: list[Tensor] = []
    for link in reversed(chain):
        seen.append(x)
        changed = x
        for op, w in link:
            if hasattr(op, "enter"):
                entered = op.enter(x, host)  # type: ignore[operator]
                changed = entered if w is None else changed + w * (entered - x)
        x = changed
    seen.reverse()
    return seen, x


def leaving(host: nn.Module, seen: list[Tensor], y: Tensor, chain: Chain, far: Far = None) -> Tensor:
    """Fold the links over the base's output y."""
    for i, (x, link) in enumerate(zip(seen, chain, strict=True)):
        y = _leave(host, x, y, link, chain[:i], far)
    return y


def _leave(host: nn.Module, x: Tensor, y: Tensor, link: Link, before: Chain, far: Far) -> Tensor:
    """Fold one link over y, the output for the input that the link sees as x, changed by its ops."""
    if len(link) == 1 and link[0][1] is None:
        op = link[0][0]
        if hasattr(op, "turn"):
            return op.turn(x, y, host, before)  # type: ignore[no-any-return, operator]
        return op.add(_input(op, x, y, host, far), y, host, None) if hasattr(op, "run") else y
    if any(hasattr(op, "turn") for op, _ in link):
        raise no_sum(next(op for op, _ in link if hasattr(op, "turn")), host)
    # Ops that read y see it as it was before this link, so they go before those that accumulate into it.
    changes = []
    for op, w in link:
        if reads(op):
            changes.append(_times(w, _change(op, x, y, host, far)))
    for d in changes:
        y = y + d.to(y.dtype)
    for op, w in link:
        if hasattr(op, "delta"):
            y = op.add(_input(op, x, y, host, far), y, host, w)
    return y


def reads(op: Op | Series) -> bool:
    """Tell whether an op makes its contribution from the output it finds."""
    return isinstance(op, Series) or (hasattr(op, "run") and not hasattr(op, "delta"))


def _change(op: Op | Series, x: Tensor, y: Tensor, host: nn.Module, far: Far) -> Tensor:
    if isinstance(op, Series):
        return op.change(x, y, host, far)
    return op.run(_input(op, x, y, host, far), y, host)  # type: ignore[no-any-return, operator]


def tangled(chain: Chain) -> bool:
    """Tell whether a weighted sum holds both ops that change the input and ops that read the output.

    In terms of weights each member of a sum changes the same W. So what reads the output must find it as its own adapter makes it, not as
    the others have changed it by way of the input.
    """
    sums = [link for link in chain if link[0][1] is not None]
    return any(any(hasattr(op, "enter") for op, _ in link) and any(reads(op) for op, _ in link) for link in sums)


def through(host: nn.Module, base: Callable[[Tensor], Any], x: Tensor, chain: Chain, far: Far) -> Any:
    """Run a tangled chain link by link: in a tangled link the base runs once more for each member that changes the input."""
    if not chain:
        return base(x)
    link, before = chain[-1], chain[:-1]
    if not tangled([link]):
        seen, entered = entering(host, x, [link])
        out = through(host, base, entered, before, far)
        return replace_first(out, _leave(host, seen[0], first_tensor(out), link, before, far))
    out = through(host, base, x, before, far)
    y0 = first_tensor(out)
    y = y0.clone()  # a fused op may write into it
    for op, w in link:
        own = first_tensor(through(host, base, op.enter(x, host), before, far)) if hasattr(op, "enter") else y0  # type: ignore[operator]
        if own is not y0:
            y = y + _times(w, own - y0).to(y.dtype)
        if reads(op):
            y = y + _times(w, _change(op, x, own, host, far)).to(y.dtype)
    for op, w in link:
        if hasattr(op, "delta"):
            y = op.add(_input(op, x, y, host, far), y, host, w)
    return replace_first(out, y)


def _times(w: Tensor | None, d: Tensor) -> Tensor:
    return d if w is None else w * d


def _input(op: Op, x: Tensor, y: Tensor, host: nn.Module, far: Far) -> Tensor:
    return tapped(far, op.entrance, y, host) if op.entrance else x


class Series:
    """The ops that one adapter has at one site, as one member of a weighted sum: its change is that of all of them in their order.

    Only made where the order matters: additive ops are members themselves.
    """

    entrance = ""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops
        self.chain: Chain = [[(op, None)] for op in ops]

    def change(self, x: Tensor, y: Tensor, host: nn.Module, far: Far) -> Tensor:
        """Return what the ops make of y, minus y."""
        return leaving(host, entering(host, x, self.chain)[0], y.clone(), self.chain, far) - y  # a fused op may write into what it is given

    def weight(self, W: Tensor) -> Tensor:
        for op in self.ops:
            W = op.weight(W) if hasattr(op, "weight") else W  # type: ignore[operator]
        return W

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all ops, one after the other."""
        pairs = [op.rows() for op in self.ops]  # type: ignore[operator]
        return torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])

    def bias(self, b: Tensor | None) -> Tensor | None:
        for op in self.ops:
            b = op.bias(b) if hasattr(op, "bias") else b  # type: ignore[operator]
        return b


class EnteringSeries(Series):
    """A series that changes the module's input, too."""

    def enter(self, x: Tensor, host: nn.Module) -> Tensor:
        return entering(host, x, self.chain)[1]


def members(op: Op | Series) -> list[Op]:
    """Return the ops that one entry of a link stands for."""
    return op.ops if isinstance(op, Series) else [op]


def entries(ops: list[Op], w: Tensor | None) -> Link:
    """Return the ops of one adapter as entries of a link that weighs it by w."""
    if len(ops) > 1 and not all(hasattr(op, "delta") for op in ops) and not any(hasattr(op, "turn") for op in ops):
        series = EnteringSeries if any(hasattr(op, "enter") for op in ops) else Series
        return [(series(ops), w)]  # type: ignore[list-item]  # an op in all that a link asks of it
    return [(op, w) for op in ops]


def narrow(chain: Chain, keep: Callable[[Op], bool]) -> Chain:
    """Return the part of a chain whose ops are to be kept."""
    found: Chain = []
    for link in chain:  # plain loops: this is compiled
        part: Link = []
        for op, w in link:
            kept = []
            for member in members(op):
                if keep(member):
                    kept.append(member)
            part += entries(kept, w)
        if part:
            found.append(part)
    return found


def no_sum(op: Op, host: nn.Module) -> CapabilityError:
    return CapabilityError(
        f"{type(op).__name__} transforms the weight it finds, so a weighted sum of it with others is not defined",
        where=host.slim.path,  # type: ignore[union-attr, arg-type]
        hint="use it alone, in a stack (a list of names), or convert it to a LoRA first: st.convert(model, name, to=st.LoRA(r=...))",
    )


def fold(host: nn.Module, base: Callable[[Tensor], Any], x: Tensor, chain: Chain, far: Far = None) -> Any:
    """Run the whole batch through one chain."""
    if tangled(chain):
        return through(host, base, x, chain, far)
    seen, entered = entering(host, x, chain)
    out = base(entered)
    if isinstance(out, Tensor):
        return leaving(host, seen, out, chain, far)
    return replace_first(out, leaving(host, seen, first_tensor(out), chain, far))


def fold_rows(host: nn.Module, base: Callable[[Tensor], Any], x: Tensor, parts: list[Part], dim: int, far: Far = None) -> Any:
    """Run each part of the rows through its own chain; the base runs once for all of them."""
    prepared: list[tuple[slice | Tensor, list[Tensor] | None, Tensor, Chain]] = []
    changed = x
    for rows, chain in parts:
        xs = take(x, rows, dim)
        if tangled(chain):
            prepared.append((rows, None, xs, chain))
            continue
        seen, entered = entering(host, xs, chain)
        if entered is not xs:
            changed = put(changed, rows, entered, dim)
        prepared.append((rows, seen, xs, chain))
    out = base(changed)
    y = first_tensor(out)
    for rows, links, xs, chain in prepared:
        near = None if far is None else {path: None if t is None else take(t, rows, dim) for path, t in far.items()}
        if links is None:
            y = put(y, rows, first_tensor(through(host, base, xs, chain, near)), dim)
        else:
            y = put(y, rows, leaving(host, links, take(y, rows, dim), chain, near), dim)
    return y if isinstance(out, Tensor) else replace_first(out, y)


def take(t: Tensor, rows: slice | Tensor, dim: int) -> Tensor:
    if isinstance(rows, slice):
        return t.narrow(dim, rows.start, rows.stop - rows.start)
    return t.index_select(dim, rows)


def put(t: Tensor, rows: slice | Tensor, values: Tensor, dim: int) -> Tensor:
    """Return t with `rows` replaced: a new tensor, since a base may have saved its output for backward."""
    values = values.to(t.dtype)
    if isinstance(rows, slice):
        return torch.slice_scatter(t, values, dim, rows.start, rows.stop)
    return t.index_copy(dim, rows, values)


def first_tensor(out: Any) -> Tensor:
    """Return the main tensor of a module's output (a tensor, a tuple that starts with one, or a ModelOutput)."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, (tuple, list)):
        return out[0]
    return next(iter(out.values()))


def replace_first(out: Any, y: Tensor) -> Any:
    """Return `out` with its main tensor replaced."""
    if isinstance(out, Tensor):
        return y
    if isinstance(out, tuple) and hasattr(out, "_replace"):
        return out._replace(**{out._fields[0]: y})  # type: ignore[attr-defined]
    if isinstance(out, (tuple, list)):
        return type(out)((y, *out[1:]))
    key = next(iter(out.keys()))
    out[key] = y
    return out
