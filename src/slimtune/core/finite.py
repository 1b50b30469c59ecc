"""Whether tensors are finite, without a temporary as large as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def is_finite(t: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity."""
    if t.is_meta or not t.numel() or not t.is_floating_point():
        return True
    t = t.detach()
    low, high = torch.aminmax(t if t.dtype.itemsize > 1 else t.half())  # NaN comes through
    return math.isfinite(float(low)) and math.isfinite(float(high))


def non_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, t in named if not is_finite(t)]
