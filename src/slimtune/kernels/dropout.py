"""Dropout whose mask is a seed: nothing is kept for backward, and projections that read the same tensor share one mask.

The mask costs more than the low-rank product it guards, so it is made of 15-bit numbers, four to a 64-bit word: the probability is rounded to
a multiple of 2^-15, and the scale 1 / (1 - p) uses the rounded p, so the mean is exact. An element stays where its number is less than
2^15 (1 - p): the sign of the difference, spread over all bits, is the mask.

Drawing a new word for every four elements costs a CPU more than all else here (its generator runs on one core). So the words are drawn once,
into a pool of 4 MiB, and a mask is a stretch of it, from a random word on, each word xored with a random key. Whatever the pool holds, the
key alone makes each element of each mask fair, and two masks that meet in a word of the pool are independent there, as their keys are.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from slimtune.kernels.recipe import Last

_LAST = threading.local()
_DROPPED = Last()


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
    _DROPPED.let_go()


def kept(shape: torch.Size, p: float, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return (mask, scale): whole numbers of `dtype`'s size, all bits set where an element stays and none where it goes; and 1 / (1 - p).

    The last mask is kept (as large as what it masks): projections that share a seed ask one after the other, forward and backward alike.
    """
    key = (shape, p, seed, device, dtype)
    below = min(max(round((1 - p) * 2**15), 1), 2**15 - 1)
    last = getattr(_LAST, "mask", None)
    if last is None or last[0] != key:
        n = shape.numel()
        numbers = _words((n + 3) // 4, seed, device).view(torch.int16)[:n]
        stays = numbers.sub_(below).bitwise_right_shift_(15)  # -1 or 0
        last = _LAST.mask = (key, stays.to(_BITS[dtype.itemsize]).view(shape))
    return last[1], 2**15 / below


def _words(n: int, seed: int, device: torch.device) -> Tensor:
    """Return n random words of four 15-bit numbers."""
    if device.type != "cpu":
        draws = torch.empty(n, dtype=torch.int64, device=device)
        return draws.random_(-(2**63), None, generator=torch.Generator(device=device).manual_seed(seed)).bitwise_and_(_NUMBERS)
    pool, state, out = _pool(), seed, torch.empty(n, dtype=torch.int64)
    for start in range(0, n, STRETCH):
        m = min(STRETCH, n - start)
        state = _mix(state)
        first = state % (POOL - STRETCH)
        torch.bitwise_xor(pool[first : first + m], _mix(state ^ seed) & _NUMBERS, out=out[start : start + m])
    return out


_NUMBERS = 0x7FFF_7FFF_7FFF_7FFF
POOL = 2**19  # words
STRETCH = 2**18  # words of the pool that one key serves: more elements than that take further stretches, each with its own
_KEPT: list[Tensor] = []


def _pool() -> Tensor:
    """Return the random words, the same in every process."""
    if _KEPT:
        return _KEPT[0]
    drawn = torch.empty(POOL, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(POOL)).bitwise_and_(_NUMBERS)
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


def dropped(x: Tensor, p: float, seed: int) -> tuple[Tensor, float]:
    """Return (x with its dropped elements zero, what the others are to be scaled with); made once for projections that ask one after the other."""
    mask, scale = kept(x.shape, p, seed, x.device, x.dtype)
    made: Tensor = _DROPPED.of((x,), (p, seed), lambda: masked(x, mask))
    return made, scale


def masked_(x: Tensor, mask: Tensor) -> Tensor:
    """As `masked`, written into x, which is contiguous."""
    x.view(mask.dtype).bitwise_and_(mask)
    return x


def dropout(x: Tensor, p: float) -> Tensor:
    """Return dropout of x, for code that a compiler traces: its own generator draws number by number on a CPU, which takes longer than the step.

    Args:
        p: probability in (0, 1).
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        dropped: Tensor = _opaque(x, p, torch.randint(0, 2**62, (), dtype=torch.int64))
        return dropped
    return torch.dropout(x, p, True)


@torch.library.custom_op("slimtune::dropout", mutates_args=())
def _opaque(x: Tensor, p: float, seed: Tensor) -> Tensor:
    mask, scale = kept(x.shape, p, int(seed), x.device, x.dtype)
    return masked(x, mask).mul_(scale)


@_opaque.register_fake
def _shape(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _way_back(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return _opaque(g, ctx.p, *ctx.saved_tensors), None, None  # the same mask and scale, over the gradient


_opaque.register_autograd(_way_back, setup_context=_keep)
