"""Write the two locks: requirements.lock (the newest versions) and requirements-oldest.lock (every dependency at exactly its lower bound).

    python .ci/lock.py FOLDER      # `make lock` calls it, runs the suite on what it wrote, and only then replaces the locks

One lock serves every platform and every Python that pyproject.toml allows (uv's universal resolution; markers tell them
apart). torch and the libraries of its CUDA build are resolved, so that all the rest agrees with them, and left out:
`.ci/venv` installs torch by version only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
BOUND = re.compile(r"([A-Za-z0-9._-]+)(\[[\w,-]+\])?(>=|==)([\w.]+)")
HEAD = "# Written by `make lock`; do not edit. {0}. torch comes from constraints.txt.\n"
NEWEST, OLDEST = "requirements.lock", "requirements-oldest.lock"


def bounds(pyproject: Path = ROOT / "pyproject.toml") -> dict[str, str]:
    """Return the lower bound of every dependency, of the extras too."""
    project = tomllib.loads(pyproject.read_text())["project"]
    listed = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    found: dict[str, str] = {}
    for item in listed:
        fit = BOUND.fullmatch(item)
        if fit:
            name = re.sub(r"[-_.]+", "-", fit[1]).lower()
            if found.setdefault(name, fit[4]) != fit[4]:
                raise SystemExit(f"pyproject.toml has two lower bounds for {name}: {found[name]} and {fit[4]}")
        elif not item.startswith("slimtune["):
            raise SystemExit(f"pyproject.toml: {item!r} has no lower bound; write {item}>=VERSION")
    return found


def without_torch(lock: str) -> str:
    """Return a lock without torch and the libraries of its CUDA build (an entry is a line and the indented lines below it)."""
    entries = re.split(r"\n(?=\S)", lock.strip())
    return "\n".join(entry for entry in entries if not OF_TORCH.match(entry)) + "\n"


def compile_lock(constraints: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        limits, out = Path(folder, "constraints.txt"), Path(folder, "lock")
        limits.write_text("\n".join(constraints) + "\n")
        command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--python-version", "3.10", "--generate-hashes"]
        command += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet", "-c", str(limits), "-o", str(out)]
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=ROOT, check=True)
        return without_torch(out.read_text())


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    oldest = [f"{name}=={version}" for name, version in bounds().items() if name != "torch"]
    for name, what, constraints in (
        (NEWEST, "The newest version of everything", torch),
        (OLDEST, "Every dependency at its lower bound", [*torch, *oldest]),
    ):
        print(f"[lock] {name}: {what.lower()}", flush=True)
        (folder / name).write_text(HEAD.format(what) + compile_lock(constraints))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
