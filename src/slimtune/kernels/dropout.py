"""Dropout whose mask is a seed: nothing is kept for backward, and projections that read the same tensor share one mask.

The mask costs more than the low-rank product it guards, so it is made of 16-bit numbers, four to a 64-bit word: the probability is rounded to
a multiple of 2^-16, and the scale 1 / (1 - p) uses the rounded p, so the mean is exact.

Drawing a new word for every four elements costs a CPU more than all else here (its generator runs on one core). So the words are drawn once,
into a pool of 4 MiB, and a mask is a stretch of it, from a random word on, each word xored with a random key. Whatever the pool holds, the
key alone makes each element of each mask fair, and two masks that meet in a word of the pool are independent there, as their keys are.
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


def kept(shape: torch.Size, p: float, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return (mask, scale): whole numbers of `dtype`'s size, all bits set where an element stays and none where it goes; and 1 / (1 - p).

    The last mask is kept (as large as what it masks): projections that share a seed ask one after the other, forward and backward alike.
    """
    key = (shape, p, seed, device, dtype)
    last = getattr(_LAST, "mask", None)
    if last is None or last[0] != key:
        stays = _draw(shape.numel(), round(p * 65536) - 32768, seed, device)
        last = _LAST.mask = (key, stays.view(shape).to(_BITS[dtype.itemsize]).neg_())
    return last[1], 65536.0 / (65536 - round(p * 65536))


def _draw(n: int, least: int, seed: int, device: torch.device) -> Tensor:
    """Return n times whether a random 16-bit number is at least `least`."""
    words = (n + 3) // 4
    if device.type != "cpu":
        draws = torch.empty(words, dtype=torch.int64, device=device)
        draws.random_(-(2**63), None, generator=torch.Generator(device=device).manual_seed(seed))
        return draws.view(torch.int16)[:n] >= least
    pool, state = _pool(), seed
    out = torch.empty(4 * words, dtype=torch.bool)
    for start in range(0, words, STRETCH):
        m = min(STRETCH, words - start)
        state = _mix(state)
        first, key = state % (POOL - STRETCH), _mix(state ^ seed)
        stretch = torch.bitwise_xor(pool[first : first + m], key - 2**64 if key >= 2**63 else key)
        torch.ge(stretch.view(torch.int16), least, out=out[4 * start : 4 * (start + m)])
    return out[:n]


POOL = 2**19  # words
STRETCH = 2**18  # words of the pool that one key serves: more elements than that take further stretches, each with its own
_KEPT: list[Tensor] = []


def _pool() -> Tensor:
    """Return the random words, the same in every process."""
    if _KEPT:
        return _KEPT[0]
    drawn = torch.empty(POOL, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(POOL))
    if type(drawn) is Tensor and not drawn.is_inference():  # what a tracing mode makes holds no numbers
        _KEPT.append(drawn)
    return drawn


def _mix(z: int) -> int:
    """Return the next 64 bits of SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195) from a state z."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with zeros where no bit of the mask is set: on a CPU that is many times faster than a product with booleans."""
    return torch.bitwise_and(x.contiguous().view(mask.dtype), mask).view(x.dtype)
