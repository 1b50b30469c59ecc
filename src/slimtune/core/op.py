"""Op: what is done at one site. A small module; what it can do is what methods it has.

    run(x, y, host) -> d       contribution: the module's output becomes y + d; may be weighted and summed
    turn(x, y, host, before) -> y'  replacement, after the links `before`: order matters, so it may be stacked but not summed
    low_rank()                 (A, B, s, dropout now) of a contribution that is s B A x, for fused kernels; None while it is more than that
    magnify(z, b, host, before)  the last step of a replacement around an op `inner`: z is what the whole weight made without the bias b
    enter(x, host) -> x'       changes the module's input
    weight(W) -> W'            exact form on the canonical weight: mergeable, convertible, combinable
    weight_rows(W[at], at)     the rows `at` of W', where `by_rows()` says that they need no others: merging then holds few in float32
    bias(b | None) -> b'       exact form on the bias
    tied                       optional attribute: an object that ops on weights tied to each other share if they do the same to them
    hold()                     context in which what the method treats as a constant for gradients is one (its stated stop-gradient)
    rows(x, tasks) -> [p, d]   stream port: p virtual tokens in front of the body's input; `tokens` says p, `shift` how many positions to
                               leave free before them (see `ports.stream.StreamOp`)

Tensors of an op are either trained (nn.Parameter) or carried (buffers); `roles` says what each trained one is, so that optimisers,
files and other libraries' names are derived from it and never from a substring of a parameter's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError

if TYPE_CHECKING:
    from slimtune.core.site import Site


_CHANGES = [0]


def changes() -> int:
    """Return a number that is another one after any attribute of any op was set: what an op has said of itself may hold no longer."""
    return _CHANGES[0]


class Op(nn.Module):
    """Base of every op.

    Attributes:
        kind, param, shape: of the site: its module kind, the weight's name and canonical shape.
        method, part: registered name of the spec that built it, and that spec's index in the adapter's `Spec.parts` (None: it is
            in none of them, as the biases in a file of the reference library).
        entrance: path of the module whose input the op is given as x, "" for that of its own module.
        roles: trained tensor name -> "down" | "up" | "gain" | "bias" | "core" | "dense".
        linear_in: for ops whose W' - W and b' - b are linear in all their trained tensors together: name -> the value they count from
            (0, or 1 for a factor). Such ops are added, scaled and pruned within their own method.
    """

    roles: ClassVar[dict[str, str]] = {}
    linear_in: ClassVar[dict[str, float]] = {}
    method: str = ""
    part: int | None = None
    entrance: str = ""

    def __init__(self, site: Site) -> None:
        super().__init__()
        if site.entrance is not None:
            self.entrance = site.entrance.path
        self.kind, self.port, self.param, self.shape = site.kind, site.port, site.param, site.shape

    def __setattr__(self, name: str, value: Any) -> None:
        # A name with _ is what an op keeps for itself while it runs, also inside compiled code, which would compile anew at each change.
        same = name[0] == "_" or (name == "training" and self.__dict__.get(name) == value)
        super().__setattr__(name, value)
        if not same:
            _CHANGES[0] += 1  # afterwards: who reads the number first must not take the old value for the new one

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _CHANGES[0] += 1

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        """Return y + w * run(x, y, host); ops with a fused form override this."""
        d = self.run(x, y, host)  # type: ignore[operator]
        return y + d.to(y.dtype) if w is None else y + (w * d).to(y.dtype)

    def by_rows(self) -> bool:
        """Tell whether rows of the new weight can be made from the same rows of the old one, with `weight_rows`."""
        return False

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        """Return the rows `at` (of dimension 0) of the new weight from those of the old one."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the (name, tensor) pairs that have a role."""
        for name in self.roles:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    # ---- files --------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Return per-site facts, beyond tensors, that a file must keep (rank, scale, ...): JSON values."""
        return {}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        """Take over the settings of a file and make room for its tensors.

        Raises:
            SpecError: the op cannot take them.
        """
        mine = self.settings()
        wrong = [f"{k}={v!r} instead of {mine.get(k)!r}" for k, v in settings.items() if k not in mine or mine[k] != v]
        if wrong:
            raise SpecError(f"{type(self).__name__} cannot be set up as in the file: {', '.join(wrong)}", where=str(site))

    def export(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a file: every parameter and every persistent buffer.

        Args:
            module: the one that this op sits on; an op whose file form depends on the base reads it there.
        """
        return {k: v for k, v in nn.Module.state_dict(self, keep_vars=True).items() if isinstance(v, Tensor)}

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes that `export` has now."""
        return {name: tuple(t.shape) for name, t in self.export(module).items()}

    def reset_from(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        """Take over the tensors of a file, names and shapes as in `expects`."""
        with torch.no_grad():
            for name, value in nn.Module.state_dict(self, keep_vars=True).items():
                value.copy_(tensors[name])


class Additive(Op):
    """An op whose effect on the weight is W + delta().

    One that can give the delta of a single expert of 3-D weights has `delta_of(e) -> [b, a]` too, so that they are never all formed at once.
    """

    def delta(self) -> Tensor:
        """Return the dense delta in canonical shape."""
        raise NotImplementedError

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return factors (A, B) whose composition is the delta, its scale included, or None where it has none."""
        found = self.low_rank() if hasattr(self, "low_rank") else None  # type: ignore[operator]
        return None if found is None else (found[0], found[2] * found[1])

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta().to(device=W.device, dtype=W.dtype)

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return self.kind.apply_op(x, self, host)


def affine(op: Op) -> bool:
    """Tell whether an op has an exact form on weight or bias, so that it can be merged."""
    return hasattr(op, "weight") or hasattr(op, "bias")


def cast(p: Tensor, like: Tensor) -> Tensor:
    """Cast a parameter to the dtype of the data: parameters go down, activations never up."""
    return p if p.dtype == like.dtype or not like.is_floating_point() else p.to(like.dtype)
