"""Putting a finished folder in place: at any moment the old files stand there complete, or the new ones, never a mixture.

1. Everything is written to a folder beside the target, and flushed.
2. No target yet: one rename. Only the weights changed: one rename of that file (the config it belongs to is in place already).
3. Otherwise the two folders are exchanged in one step (Linux renameat2, macOS renamex_np), and the old one is removed.
4. Where that is not to be had, or the folder also holds files of others, the config is taken away, the weights are renamed in,
   the config is renamed in. Weights of ours carry their config in the header, so that slimtune reads old or new at any point.

A staging folder that a killed process left behind is removed by the next save; a lock tells it from one at work.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slimtune.core.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def publish(folder: Path, write: Callable[[Path], None], *, last: str, alone: frozenset[str]) -> None:
    """Write a set of files and put them into `folder` all at once.

    Args:
        folder: the target; made if missing.
        write: fills the empty folder it is given.
        last: name of the file that commits the rest.
        alone: names of the files that make up the set; any other file in `folder` belongs to someone else and stays.

    Raises:
        FileError: the disk is full or the place cannot be written; the old files are untouched.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file, not a folder", hint="give the name of a folder")
        with staging(folder) as stage:
            write(stage)
            for name in sorted(os.listdir(stage)):
                flush_path(stage / name)
            flush_path(stage)
            _install(stage, folder, last, alone)
            flush_path(folder.parent)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(
            f"cannot write to {folder}: {error.strerror or error}",
            where=str(folder),
            hint="free some space or choose another folder; what was there is untouched",
        ) from None


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Give an empty folder on the target's own file system, and remove it afterwards."""
    inside = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK))
    home = folder if inside else folder.parent
    prefix = ".slimtune-" if inside else f".{folder.name}.slimtune-"
    _sweep(home, prefix)
    stage = home / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    stage.mkdir(mode=0o700)
    lock = os.open(stage, os.O_RDONLY) if fcntl is not None else None
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (stage / "new").mkdir()
        yield stage / "new"
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _sweep(home: Path, prefix: str) -> None:
    for name in os.listdir(home):
        if not name.startswith(prefix):
            continue
        with contextlib.suppress(OSError):  # another process may sweep, too
            if fcntl is None:
                if time.time() - os.stat(home / name).st_mtime > 24 * 3600:
                    shutil.rmtree(home / name)
                continue
            handle = os.open(home / name, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > 2:  # a younger one may be about to be locked
                    shutil.rmtree(home / name)
            finally:
                os.close(handle)


def _install(stage: Path, folder: Path, last: str, alone: frozenset[str]) -> None:
    new = sorted(os.listdir(stage))
    if not folder.exists():
        os.rename(stage, folder)
        return
    there = set(os.listdir(folder)) - {stage.parent.name}
    changed = [name for name in new if name != last and not _same(stage / name, folder / name)]
    stale = sorted(there & alone - set(new))  # ours, but not part of the new set
    if changed or stale:
        if there <= alone and stage.parent.parent != folder:
            os.chmod(stage, os.stat(folder).st_mode & 0o7777)
            if not there and _replaced(stage, folder):
                return
            if exchange(stage, folder):
                return
        for name in [*changed, *stale]:  # see 4. above
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / name)
    os.replace(stage / last, folder / last)
    for name in changed:
        os.replace(stage / name, folder / name)
    flush_path(folder)


def _replaced(stage: Path, folder: Path) -> bool:
    """Rename over an empty folder."""
    try:
        os.rename(stage, folder)
    except OSError:
        return False
    return True


def _same(a: Path, b: Path) -> bool:
    try:
        return not b.is_symlink() and a.read_bytes() == b.read_bytes()
    except FileNotFoundError:
        return False


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    if sys.platform not in {"linux", "darwin"}:
        return False
    libc = ctypes.CDLL(None)
    x, y = os.fsencode(a), os.fsencode(b)
    try:
        if sys.platform == "linux":
            at_cwd, swap = -100, 2
            return bool(libc.renameat2(at_cwd, x, at_cwd, y, swap) == 0)
        return bool(libc.renamex_np(x, y, 2) == 0)
    except AttributeError:  # an older C library
        return False


def flush_path(path: Path) -> None:
    """Hand a file's bytes, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
