"""The effective weight of a chain: what the affine ops of one weight make of it, with gradients.

Kinds that cannot add a contribution to an output (the projections inside nn.MultiheadAttention have none) run on it instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError
from slimtune.core.fold import Chain, members, narrow, no_sum
from slimtune.core.op import Op, affine


def of_param(chain: Chain, param: str) -> Chain:
    """Return the part of a chain that acts on one weight."""
    return narrow(chain, lambda op: op.port == "weight" and op.param == param)


def effective(
    weight: Tensor, bias: Tensor | None, chain: Chain, host: nn.Module, at: slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return (weight, bias) after a chain, computed in float32 (float64 for float64) and cast once to the weight's dtype.

    Args:
        at: the rows of the whole weight that `weight` is, where that is not all of it; every op is one `by_rows` then.

    Raises:
        CapabilityError: an op has no exact form on the weight, or is weighted and transforms the weight it finds.
    """
    if not chain:
        return weight, bias
    work = weight.dtype if weight.dtype == torch.float64 else torch.float32
    W = weight.to(work)
    for link in chain:
        plain = len(link) == 1 and link[0][1] is None
        W0 = W
        for op, w in link:
            for member in members(op):
                _check(member, plain, host)
            if hasattr(op, "weight"):
                new = op.weight(W0) if at is None else op.weight_rows(W0, at)  # type: ignore[operator]
                W = new if w is None else W + w.to(work) * (new - W0)
    b = effective_bias(None if bias is None else bias.to(work), chain)
    return W.to(weight.dtype), None if b is None else b.to(weight.dtype)


def effective_bias(b: Tensor | None, chain: Chain) -> Tensor | None:
    """Return the bias after a chain; no weight has a part in it."""
    for link in chain:
        b0 = b
        for op, w in link:
            if hasattr(op, "bias"):
                new = op.bias(b0)  # type: ignore[operator]
                if new is not None and w is not None:
                    zero = torch.zeros_like(new) if b0 is None else b0
                    new = (zero if b is None else b) + w.to(new.dtype) * (new - zero)
                b = b if new is None else new
    return b


def _check(op: Op, plain: bool, host: nn.Module) -> None:
    if not affine(op):
        raise CapabilityError(
            f"{type(op).__name__} has no exact form on the weight, and a projection inside {type(host).__name__} has no output of its own",
            where=host.slim.path,  # type: ignore[union-attr, arg-type]
            hint="leave this module out with exclude=, or use a method that merges (st.methods() shows which)",
        )
    if hasattr(op, "turn") and not plain:
        raise no_sum(op, host)
