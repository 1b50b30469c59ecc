"""A full disk in words: libraries raise half a dozen kinds of errors for it, some of which do not say what happened."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from slimtune.core.errors import FileError, SlimtuneError

FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "files may not get this large"}
LITTLE = 1 << 20  # bytes left below which a failed write is blamed on the disk


@contextlib.contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when a disk is full into one sentence.

    Args:
        folder: where the block writes.

    Raises:
        FileError: saying where there is no space.
    """
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as error:
        words = reason(error, folder)
        if words is None:
            raise
        hint = "make room and go on with --resume: what was saved before is kept"
        raise FileError(f"{words} in {folder}", where=str(getattr(error, "filename", None) or folder), hint=hint) from error


def reason(error: BaseException, folder: Path) -> str | None:
    """Return what a failed write has to do with the disk, or None if it has nothing to do with it."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in FULL:
            return FULL[chain.errno]
        # safetensors (Rust) and torch (C++) put the system's message, or none at all, into errors of their own
        for code, words in FULL.items():
            if f"os error {code})" in str(chain):
                return words
        if "PytorchStreamWriter" in str(chain) or "unexpected pos" in str(chain):
            return "a file could not be written" + (" (no space left)" if _free(folder) < LITTLE else "")
        chain = chain.__cause__ or chain.__context__
    return None


def _free(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return LITTLE
