"""The table method x architecture, made from a run: every method with its defaults on every model of the zoo.

    python -m slimtune.testing.architectures --write docs/architectures.md                  # runs every cell (minutes); fails if one does not hold
    python -m slimtune.testing.architectures --check docs/architectures.md                  # compares the file with such a run
    python -m slimtune.testing.architectures --only "lora:T5" --only "vera:"                # some cells, with the whole error

A cell is one method on one model. It works, which is the list CHECKS below, or attaching is refused with a reason, which the table gives.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import slimtune as st
from slimtune.core.errors import SlimtuneError
from slimtune.core.spec import Spec
from slimtune.testing import architecture_checks as checks
from slimtune.testing.matrix import own_methods
from slimtune.testing.subject import bits, classes, refused
from slimtune.testing.zoo import ARCHITECTURES, Architecture

CHECKS: dict[str, Callable[[checks.Bench], str]] = {
    "starts as it says": checks.start,
    "learns": checks.learns,
    "gradients reach every parameter": checks.gradients_arrive,
    "disabled = base": checks.disabled,
    "mixed rows = each row alone": checks.rows,
    "merge = forward, unmerge restores the bits": checks.merge,
    "saved and loaded: same output": checks.files,
    "gradient checkpointing: same gradients": checks.checkpointing,
    "generate": checks.generate,
}


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        refusal: why attaching is refused; "" if the method works here.
        limits: what does not hold although it works, by the check that says so.
        failures: checks that failed, with what they said.
        seconds: taken.
    """

    refusal: str = ""
    limits: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def words(self) -> list[str]:
        """Return what the table says of it: yes and its limits, or no and the reason."""
        return ["no", self.refusal] if self.refusal else ["yes", *dict.fromkeys(self.limits.values())]


def refusal(spec: Spec, model: Architecture) -> str:
    """Return why a method cannot be attached, or ""; assert that the refusal is a good one and leaves the model alone."""
    made = model.build()
    before, kinds = bits(made), classes(made)
    try:
        st.attach(made, spec, name="a")
        return ""
    except SlimtuneError as error:
        caught = error
    with refused(SlimtuneError, what=f"{type(spec).__name__} on {model}", place=True):
        raise caught
    assert bits(made) == before, "the refused attach changed the model"
    assert classes(made) == kinds, "the refused attach changed classes"
    assert "slim_state" not in made.__dict__, "the refused attach left its state behind"
    return caught.what


def run_cell(spec: Spec, model: Architecture, *, whole_errors: bool = False) -> Outcome:
    """Run one cell and return what became of it.

    Args:
        whole_errors: keep the traceback of what fails.
    """
    began = time.perf_counter()
    limits: dict[str, str] = {}
    failures: dict[str, str] = {}
    with silent():
        try:
            reason = refusal(spec, model)
        except Exception as error:
            return Outcome(failures={"attach": _said(error, whole_errors)})
        for name, check in CHECKS.items() if not reason else ():
            try:
                limit = check(checks.Bench(spec, model))
                if limit:
                    limits[name] = limit
            except Exception as error:
                failures[name] = _said(error, whole_errors)
    return Outcome(reason, limits, failures, time.perf_counter() - began)


@contextmanager
def silent() -> Iterator[None]:
    """No warnings and no log lines of the model libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _said(error: Exception, whole: bool) -> str:
    if whole:
        return "".join(traceback.format_exception(error))
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:600]} ({at.filename.rsplit('/', 1)[-1]}:{at.lineno})"


def table(names: Iterable[str], models: Iterable[Architecture] = ARCHITECTURES, *, quiet: bool = True) -> dict[str, dict[str, Outcome]]:
    """Run cells and return architecture -> method -> outcome."""
    methods = st.methods()
    found: dict[str, dict[str, Outcome]] = {}
    for model in models:
        found[model.name] = {name: run_cell(methods[name](), model) for name in names}
        if not quiet:
            took = sum(o.seconds for o in found[model.name].values())
            print(f"{model.name}: {len(found[model.name])} cells in {took:.1f} s", file=sys.stderr, flush=True)
    return found


def failures(cells: dict[str, dict[str, Outcome]]) -> list[str]:
    """Return every check that failed, one a line."""
    return [f"{m} on {a}, {c}: {text}" for a, row in cells.items() for m, o in row.items() for c, text in o.failures.items()]


# ---- the page -----------------------------------------------------------------------------------------------------
def render(cells: dict[str, dict[str, Outcome]]) -> str:
    """Return the table as Markdown."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    def mark(o: Outcome) -> str:
        word, *why = o.words()
        return " ".join([word, *map(note, why)])

    groups: dict[str, list[Architecture]] = {}
    for a in ARCHITECTURES:
        if a.name in cells:
            groups.setdefault(a.group, []).append(a)
    names = list(next(iter(cells.values())))
    lines = [
        "# Methods on architectures",
        "",
        "Made by `python -m slimtune.testing.architectures --write docs/architectures.md`, which runs every cell: each method with its defaults",
        "(`st.methods()[name]()`, targets too) on a model of the real class with small random weights. `yes` means that all of this holds there:",
        "",
        *(f"- {name}" for name in CHECKS),
        "",
        "`no` is a refusal, with the reason that the error gives. A number after `yes` is a limit.",
        "Checked in float64; two ways of computing the same agree to 1e-9 of the largest entry, or to 2e-6 where the model itself computes its",
        "norms, positions or attention in float32 (BLOOM: in float32, to 1e-4).",
        "Merging and `generate` are checked wherever method and model have them: a method that is no affine map of its input refuses to merge",
        "([support matrix](support-matrix.md)).",
    ]
    for group, members in groups.items():
        lines += ["", f"## {group}", "", "| architecture | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        lines += [f"| {a.name} | " + " | ".join(mark(cells[a.name][n]) for n in names) + " |" for a in members]
    lines += ["", "## Notes", "", *(f"{i}. {text}" for i, text in enumerate(notes, 1))]
    return "\n".join([*lines, ""])


def stated(page: str) -> dict[tuple[str, str], list[str]]:
    """Return what a page says: (architecture, method) -> `Outcome.words`."""
    notes = {m[1]: m[2] for m in re.finditer(r"^(\d+)\. (.*)$", page, re.MULTILINE)}
    found: dict[tuple[str, str], list[str]] = {}
    names: list[str] = []
    for line in page.splitlines():
        first, *cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("| ") else [""]
        if first == "architecture":
            names = cells
        elif first:
            for name, text in zip(names, cells, strict=True):
                found[first, name] = [text.split()[0], *(notes[n] for n in re.findall(r"\[(\d+)\]", text))]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m slimtune.testing.architectures", description="Write or check the table of architectures.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the table, if every cell holds")
    parser.add_argument("--check", metavar="FILE", type=Path, help="compare the file with a run")
    parser.add_argument("--only", metavar="METHOD:ARCHITECTURE", action="append", help="run these cells and show whole errors; either may be empty")
    options = parser.parse_args(argv)
    if options.only:
        return _some(options.only)
    cells = table(own_methods(), quiet=False)
    failed = failures(cells)
    print("\n".join(failed), file=sys.stderr)
    print(f"{sum(map(len, cells.values()))} cells, {len(failed)} checks fail")
    if failed:
        return 1
    fresh = render(cells)
    if options.write is not None:
        options.write.write_text(fresh)
    if options.check is not None and (old := options.check.read_text() if options.check.exists() else "") != fresh:
        said, now = stated(old), stated(fresh)
        for key in dict.fromkeys([*said, *now]):
            if said.get(key) != now.get(key):
                print(f"{key[1]} on {key[0]}: the page says {said.get(key)}, the run {now.get(key)}", file=sys.stderr)
        print(f"{options.check} is out of date: python -m slimtune.testing.architectures --write {options.check}", file=sys.stderr)
        return 1
    return 0


def _some(wanted: list[str]) -> int:
    failed = 0
    for text in wanted:
        method, _, model = text.partition(":")
        for name, spec in st.methods().items():
            for a in ARCHITECTURES:
                if method in {"", name} and model in {"", a.name}:
                    outcome = run_cell(spec(), a, whole_errors=True)
                    failed += bool(outcome.failures)
                    word = "FAILS" if outcome.failures else f"refused: {outcome.refusal}" if outcome.refusal else "holds"
                    print(f"{name} on {a} ({outcome.seconds:.2f} s): {word}")
                    for check, said in [*outcome.limits.items(), *outcome.failures.items()]:
                        print(f"    {check}: {said}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
