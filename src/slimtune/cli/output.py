"""Where a command writes: a new or empty folder, asked before the work is done. Nothing that somebody has made is overwritten."""

from __future__ import annotations

from pathlib import Path

from slimtune.core.errors import FileError


def new_folder(out: str) -> Path:
    """Return the folder that a command may write to.

    Args:
        out: what the user typed.

    Raises:
        FileError: something is there.
    """
    target = Path(out)
    if target.is_symlink() and not target.exists():
        raise FileError("the output is a link to something that does not exist", where=out, hint="choose a new folder")
    if target.exists() and not target.is_dir():
        raise FileError("the output is a file", where=out, hint="choose a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise FileError("the output folder is not empty", where=out, hint="choose a new folder; nothing is overwritten")
    return target
