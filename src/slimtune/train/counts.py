"""Counts that take seconds to make and never change: kept in the cache under a digest of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from slimtune.train.fetch import cache_dir
from slimtune.version import __version__

T = TypeVar("T")


def remember(key: Any, count: Callable[[], T]) -> T:
    """Return what `count()` returned for this key once, or call it. A cache that cannot be read or written costs time, nothing else.

    Args:
        key: JSON values that decide the result; the versions of slimtune, torch and transformers are added.
        count: returns JSON values.
    """
    import transformers

    versions = [__version__, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps([versions, key], sort_keys=True, default=str).encode()).hexdigest()
    path = cache_dir() / "counts" / f"{digest[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        found: T = json.loads(path.read_text(encoding="utf-8"))
        return found
    result = count()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(result, f)
        os.replace(name, path)  # another process sees all of it or nothing
    return result
