"""Dropout whose mask is a seed: nothing is kept for backward, and projections that read the same tensor share one mask.

The mask costs more than the low-rank product it guards, so it is drawn as 16-bit numbers, four from each 64-bit draw: the probability is
rounded to a multiple of 2^-16, and the scale 1 / (1 - p) uses the rounded p, so the mean is exact.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

_LAST = threading.local()


def draw_seed(x: Tensor, asking: Tensor) -> int:
    """Return the seed of the mask for x, from torch's generator: one for all who read the same tensor object, a new one when one asks again.

    Args:
        x: what is dropped from.
        asking: identifies who asks (its down projection): the same layer on the same input in the next step must get another mask.
    """
    last = getattr(_LAST, "entry", None)
    if last is not None and last[0]() is x and last[1] == x._version and id(asking) not in last[3]:
        last[3].add(id(asking))
        return last[2]
    seed = int(torch.randint(0, 2**62, (), dtype=torch.int64))
    _LAST.entry = (weakref.ref(x), x._version, seed, {id(asking)})
    return seed


def forget() -> None:
    """Share no mask with what ran before: at the border of a checkpointed region, whose second run must draw as its first."""
    _LAST.entry = _LAST.mask = None


def kept(shape: torch.Size, p: float, seed: int, device: torch.device) -> tuple[Tensor, float]:
    """Return (mask, scale): a bool mask of what stays, and 1 / (1 - p).

    The last mask is kept (a byte an element): projections that share a seed ask one after the other, forward and backward alike.
    """
    key = (shape, p, seed, device)
    last = getattr(_LAST, "mask", None)
    if last is None or last[0] != key:
        last = _LAST.mask = (key, _draw(shape, p, seed, device))
    return last[1], 65536.0 / (65536 - round(p * 65536))


def _draw(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    n = shape.numel()
    generator = torch.Generator(device=device).manual_seed(seed)
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:n].view(shape) >= round(p * 65536) - 32768


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with zeros where the mask is false. Its bits are masked: on a CPU that is many times faster than a product with booleans."""
    bits = _BITS[x.element_size()]
    return mask.to(bits).neg_().bitwise_and_(x.contiguous().view(bits)).view(x.dtype)


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """Return x with its dropped elements zero and the others scaled; without gradient."""
    mask, scale = kept(x.shape, p, seed, x.device)
    return masked(x * scale, mask)
