"""The run folder: everything one training run leaves behind, and how later commands find it again.

    runs/NAME/
      recipe.yaml        the recipe as it was run, every default filled in
      environment.json   Python, platform, threads, versions
      metrics.jsonl      one line per logged step
      checkpoints/       step folders, each complete (written beside, then renamed)
      adapter/           the result (or model/ after `method: full`)
      tokenizer/         with the recipe's `add_tokens`, if it has any
      results.json       everything the report shows
      summary.json       the few figures a script wants
      report.html        one self-contained page; figures/*.png are its pictures

Every file is written to a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimtune.core.errors import FileError, RecipeError

_CHECKPOINT = re.compile(r"^step-(\d+)$")
LOCK = ".lock"
REPORT_FILES = ("results.json", "summary.json", "report.html")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old file or the new one, never half of it.

    Args:
        path: the file; its folder is created.
        text: the whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise FileError("this file is missing", where=str(path), hint="was the run stopped before its end? Try --resume") from e
    except (ValueError, OSError) as e:
        raise FileError(f"this file cannot be read: {e}", where=str(path), hint="run the training again, or --resume it") from e
    if not isinstance(value, dict):
        raise FileError("this file does not hold a JSON object", where=str(path))
    return value


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder (or of one file)."""
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; it creates and checks nothing by itself."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Where `method: full` leaves its weights."""
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        """Where a run with new tokens leaves the tokenizer that knows them."""
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def complete_checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first (an unfinished one still has its temporary name)."""
        if not self.checkpoints.is_dir():
            return []
        found = [(int(m.group(1)), p) for p in self.checkpoints.iterdir() if p.is_dir() and (m := _CHECKPOINT.match(p.name))]
        return [p for _, p in sorted(found)]

    def latest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint."""
        found = self.complete_checkpoints()
        return found[-1] if found else None

    def remove_leftovers(self) -> None:
        """Delete what a killed run left under temporary names."""
        for folder in (self.path, self.checkpoints):
            if folder.is_dir():
                for p in folder.iterdir():
                    if p.name.startswith(".") and p.name.endswith(".tmp"):
                        shutil.rmtree(p) if p.is_dir() else p.unlink()

    def remove_older_checkpoints(self, keep: int) -> None:
        """Keep the newest `keep` checkpoints."""
        for old in self.complete_checkpoints()[:-keep]:
            doomed = old.with_name(f".{old.name}.tmp")  # renamed first, so a kill never leaves half a checkpoint behind
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def is_finished(self) -> bool:
        """True when the result and its figures were written."""
        return self.results.is_file() and (self.adapter.is_dir() or self.model.is_dir())

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe of this run.

        Raises:
            FileError: missing or damaged.
        """
        try:
            value = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise FileError("this is not a run folder: it has no recipe.yaml", where=str(self.path)) from e
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
            raise FileError(f"the run's recipe cannot be read: {e}", where=str(self.recipe)) from e
        if not isinstance(value, dict):
            raise FileError("the run's recipe is empty or not a mapping", where=str(self.recipe))
        return value


def check_out(path: Path, resume: bool) -> RunFolder:
    """Return the folder of a run that could start now; nothing is made.

    Args:
        path: the run folder.
        resume: continue what is there instead of starting afresh.

    Raises:
        RecipeError: the folder holds another run, or there is nothing to resume.
    """
    folder = RunFolder(path)
    if path.is_symlink() and not path.exists():
        raise RecipeError("the output path is a link to something that does not exist", where=str(path), hint="set `out:` to a new folder")
    if path.exists() and not path.is_dir():
        raise RecipeError("the output path is a file, not a folder", where=str(path), hint="set `out:` to a new folder")
    if resume:
        if folder.is_finished():
            raise RecipeError(
                "this run is finished: there is nothing to resume",
                where=str(path),
                hint=f"slimtune eval {path}, or train into another folder with out=NEW_FOLDER",
            )
        if folder.latest_checkpoint() is None and not folder.recipe.is_file():
            raise RecipeError("there is no run to resume here", where=str(path), hint="leave --resume away to start it")
    elif path.is_dir() and any(p.name != LOCK for p in path.iterdir()):
        resumable = folder.latest_checkpoint() is not None and not folder.is_finished()
        raise RecipeError(
            "the output folder already holds a run" if folder.recipe.is_file() else "the output folder is not empty",
            where=str(path),
            hint=("continue it with --resume, or " if resumable else "") + "choose another folder with out=NEW_FOLDER",
        )
    return folder


def new_run(path: Path, resume: bool) -> RunFolder:
    """Prepare the folder of a run that is about to start; arguments and errors as for `check_out`."""
    folder = check_out(path, resume)
    path.mkdir(parents=True, exist_ok=True)
    folder.remove_leftovers()
    return folder


@contextlib.contextmanager
def run_alone(path: Path, resume: bool) -> Iterator[RunFolder]:
    """Prepare the folder of a run and hold it for this process alone.

    Args:
        path, resume: as for `check_out`.

    Raises:
        RecipeError: another run is at work in it, or what `check_out` says.
    """
    from filelock import FileLock, Timeout  # torch and transformers depend on it

    if not path.is_dir():
        check_out(path, resume)  # before anything is made
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        hint = "wait until it has ended, or choose another folder with out=NEW_FOLDER"
        raise RecipeError("another run is at work in this folder", where=str(path), hint=hint) from None
    try:
        yield new_run(path, resume)
    finally:
        (path / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        lock.release()


def open_run(path: str | os.PathLike[str]) -> RunFolder:
    """Open a finished run for eval, generate, chat or merge.

    Args:
        path: the run folder that `slimtune train` wrote.

    Raises:
        FileError: not a run, or a run without a result; the hint says what to do.
    """
    folder = RunFolder(Path(path))
    if not folder.path.exists():
        parent = folder.path.parent
        near = sorted(str(p.parent) for p in parent.glob("*/recipe.yaml")) if parent.is_dir() else []
        raise FileError(
            "there is no such run",
            where=str(folder.path),
            hint=f"runs here: {', '.join(near[:8])}" if near else "train one first: slimtune train RECIPE.yaml",
        )
    if not folder.path.is_dir():
        raise FileError("this is a file; a run is a folder", where=str(folder.path), hint="give the folder that `slimtune train` wrote")
    if not folder.recipe.is_file():
        looks_like_adapter = (folder.path / "adapter_config.json").is_file()
        raise FileError(
            "this is not a run folder: it has no recipe.yaml",
            where=str(folder.path),
            hint="this looks like an adapter: give the run folder above it" if looks_like_adapter else "give the folder that `slimtune train` wrote",
        )
    if not (folder.adapter.is_dir() or folder.model.is_dir()):
        step = folder.latest_checkpoint()
        raise FileError(
            "this run has no result yet" + (f" (it stopped at {step.name})" if step else ""),
            where=str(folder.path),
            hint=f"finish it: slimtune train {shlex.quote(str(folder.recipe))} --resume",
        )
    return folder
