"""The locks and pyproject.toml say the same, every import is declared, and the wheel has every file."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path(os.environ.get("SLIMTUNE_LOCKS", ROOT))  # `make lock` tests the new ones before they replace the old
PACKAGE_OF = {"sklearn": "scikit-learn", "yaml": "pyyaml", "google": "protobuf"}
MODULES_OF_TESTS = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"benchmarks", "slimtune"}


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(name: str) -> dict[str, list[str]]:
    """Return package -> its entries in a lock (one for each marker)."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=[a-z0-9])", (LOCKS / name).read_text()):
        if "==" in entry.partition("\n")[0]:
            found.setdefault(entry.partition("==")[0], []).append(entry)
    return found


def version(entry: str) -> tuple[int, ...]:
    return numbers(re.split(r"[ ;\\]", entry.partition("==")[2])[0])


def numbers(text: str) -> tuple[int, ...]:
    parts = [int(part) for part in text.strip().split(".") if part.isdigit()]
    while parts and parts[-1] == 0:  # 8 is 8.0.0
        parts.pop()
    return tuple(parts)


def imports(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names} - MODULES_OF_TESTS


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-oldest.lock"])
def test_a_lock_is_exact_has_hashes_and_leaves_torch_out(lock: ModuleType, name: str) -> None:
    held = entries(name)
    assert len(held) > 80
    assert all("--hash=sha256:" in entry for found in held.values() for entry in found)
    assert not [package for package in held if lock.OF_TORCH.match(f"{package}==")]
    for package in ("sympy", "networkx", "jinja2", "filelock", "fsspec", "typing-extensions", "setuptools"):
        assert package in held, f"torch, or building the project, would bring {package} in any version"


def test_the_lock_fits_every_bound(lock: ModuleType) -> None:
    held = entries("requirements.lock")
    for package, bound in lock.bounds().items():
        if package != "torch":
            assert package in held, f"{package} is in pyproject.toml and not in the lock: make lock"
            assert all(version(entry) >= numbers(bound) for entry in held[package]), f"{package} is below {bound}: make lock"


def test_the_oldest_lock_holds_every_dependency_at_its_lower_bound(lock: ModuleType) -> None:
    held = entries("requirements-oldest.lock")
    wrong = {p: b for p, b in lock.bounds().items() if p != "torch" and [version(e) for e in held.get(p, [])] != [numbers(b)]}
    assert not wrong, f"make lock: {wrong}"


def test_torch_is_held_by_version() -> None:
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\n", (ROOT / "constraints.txt").read_text())


def test_torch_is_left_out_of_a_lock_with_its_libraries(lock: ModuleType) -> None:
    def text(*names: str) -> str:
        return "".join(f"{name} \\\n    --hash=sha256:0\n" for name in names)

    assert lock.without_torch(text("a==1", "torch==2", "nvidia-nccl-cu13==2 ; sys_platform == 'linux'", "z==3")) == text("a==1", "z==3")


def test_every_import_is_declared(lock: ModuleType) -> None:
    declared = set(lock.bounds())
    used = imports("src") | imports("tests") | imports("benchmarks")
    # numpy comes with transformers, tokenizers and pandas with it and datasets: what we use of them is what those give and take
    missing = {name for name in used if PACKAGE_OF.get(name, name).replace("_", "-") not in declared} - {"numpy", "tokenizers", "pandas", "PIL"}
    assert not missing, f"imported and not in pyproject.toml: {sorted(missing)}"


def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "out"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((tmp_path / "out").glob("*.whl"))
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("slimtune/")}
    ours = {path.relative_to(source / "src").as_posix() for path in (source / "src" / "slimtune").rglob("*") if path.is_file()}
    assert any(name.endswith(".yaml") for name in ours)
    assert "slimtune/py.typed" in ours
    assert there == ours, f"not in the wheel: {sorted(ours - there)}; in the wheel only: {sorted(there - ours)}"
