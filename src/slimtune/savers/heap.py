"""Freed memory stays with the process: C's allocator on Linux gives large freed blocks back, and takes them again page by page.

A training step frees what it kept and needs as much again a moment later. Every page that went back costs a fault, which on virtual
machines is dear: 10,000 to 70,000 of them in a step of SmolLM2-135M, 3 to 10 % of its time. What a process needs at most grows little by it, as the
blocks are used again.

Sources: mallopt(3): M_TRIM_THRESHOLD (-1), M_MMAP_THRESHOLD (-3, at most 32 MiB), and the environment variables that set the same.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM, _MMAP = -1, -3
_MOST = 2**25  # the largest M_MMAP_THRESHOLD that glibc takes
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD", "GLIBC_TUNABLES")


def keep_freed() -> str:
    """Make the allocator keep what is freed, for the whole process; return why not, or ""."""
    chosen = next((name for name in _CHOSEN if os.environ.get(name)), None)
    if chosen is not None:
        return f"the environment chooses an allocator or its settings ({chosen})"
    return "" if _set(2**31 - 1) else "C's library is not glibc"


def give_back() -> None:
    """Undo `keep_freed`: thresholds at which glibc's own, which adapt, end up in a process with tensors; free memory goes back at once."""
    if not any(os.environ.get(name) for name in _CHOSEN) and _set(2 * _MOST):
        ctypes.CDLL(None).malloc_trim(0)


def _set(trim: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no mallopt; blocks below _MOST must not be mapped one by one, as those go back whenever they are freed
    return mallopt is not None and bool(mallopt(_TRIM, trim)) and bool(mallopt(_MMAP, _MOST))
