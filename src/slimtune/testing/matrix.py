"""The support matrix (method x kind of site x property), made from a run of the conformance suite.

    python -m slimtune.testing.matrix --write docs/support-matrix.md     # runs every check first; fails if one does not hold
    python -m slimtune.testing.matrix --check docs/support-matrix.md     # only compares what methods declare with the file
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import slimtune as st
from slimtune.core.spec import Spec
from slimtune.testing.cases import CASES
from slimtune.testing.properties import COMPILED, PROPERTIES
from slimtune.testing.subject import Subject
from slimtune.testing.suite import HOME, checks

NEEDS = {  # properties that ask for a capability: what is asserted where a method lacks it
    "merge = forward": ("merge", "it is no affine map of its input, so no weight equals it; merging raises CapabilityError"),
    "unmerge restores the bits": ("merge", "it never merges; unmerging raises MergeError"),
    "weighted sum": ("sum", "it transforms the weight it finds, so order matters; a weighted sum raises CapabilityError"),
}


@dataclass(frozen=True)
class Cell:
    """What one method can do on one case: `refusal` is the reason why it cannot sit there at all, "" if it can."""

    refusal: str
    merge: bool = False
    sum: bool = False
    rows: bool = False


def cell(spec: Spec, subject: Subject) -> Cell:
    """Work out one cell from what spec, kind and ops declare."""
    model = subject.case.build()
    problem = subject.expected_problem(model)
    if problem:
        return Cell(problem.replace(" 'body'", ""))
    model = subject.attached("a", busy=False)
    return Cell("", subject.can_merge(model), subject.can_sum(model), subject.case.rows)


def table(names: list[str]) -> dict[str, dict[str, Cell]]:
    """Return method -> case -> cell."""
    specs = {name: st.methods()[name]() for name in names}
    return {name: {c.name: cell(spec, Subject(spec, c)) for c in CASES} for name, spec in specs.items()}


def render(cells: dict[str, dict[str, Cell]]) -> str:
    """Return the matrix as Markdown."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    def mark(c: Cell) -> str:
        return f"no {note(c.refusal)}" if c.refusal else "yes"

    names = list(cells)
    accept = sum(not c.refusal for row in cells.values() for c in row.values())
    refuse = sum(bool(c.refusal) for row in cells.values() for c in row.values())
    homes = sum(not row[HOME].refusal for row in cells.values())
    count = accept * len(PROPERTIES) + homes * len(COMPILED) + refuse
    lines = [
        "# Support matrix",
        "",
        "Made by `python -m slimtune.testing.matrix --write docs/support-matrix.md` after every check of the conformance suite has passed;",
        "`tests/conformance/test_matrix.py` fails when it is out of date. A cell that says no is a refusal with a reason, and the suite",
        "asserts the error, once. Nothing is skipped.",
        "",
        f"{len(names)} methods on {len(CASES)} kinds of module: {accept} cells accept, {refuse} refuse; {count:,} checks, no two alike.",
        "",
        "## Where each method goes",
        "",
        "| kind of module | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    lines += [f"| {c.name} | " + " | ".join(mark(cells[n][c.name]) for n in names) + " |" for c in CASES]
    lines += ["", "## What holds there", "", "The number of kinds of module on which each property is checked.", ""]
    lines += ["| property | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for prop in [*PROPERTIES, *COMPILED]:
        row = []
        for n in names:
            own = {k: c for k, c in cells[n].items() if not c.refusal and (prop not in COMPILED or k == HOME)}
            need = NEEDS.get(prop)
            able = [k for k, c in own.items() if need is None or getattr(c, need[0])]
            text = str(len(able)) if able or need is None else "no"
            row.append(text if need is None or len(able) == len(own) else f"{text} {note(need[1])}")
        lines.append(f"| {prop} | " + " | ".join(row) + " |")
    lines += ["", "## Notes", ""]
    lines += [f"{i}. {text}" for i, text in enumerate(notes, 1)]
    return "\n".join([*lines, ""])


def own_methods() -> list[str]:
    """Return the methods that come with slimtune, not those a third party has registered."""
    return [name for name, spec in st.methods().items() if spec.__module__.startswith("slimtune.methods.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m slimtune.testing.matrix", description="Write or check the support matrix.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="run every check, then write the matrix")
    parser.add_argument("--check", metavar="FILE", type=Path, help="compare the file with what methods declare")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    names = own_methods()
    if options.write is None:
        fresh = render(table(names))
        if options.check is None:
            print(fresh)
        elif not options.check.exists() or options.check.read_text() != fresh:
            print(f"{options.check} is out of date: python -m slimtune.testing.matrix --write {options.check}", file=sys.stderr)
            return 1
        return 0
    failed = 0
    todo = [check for name in names for check in checks(name)]
    for check in todo:
        try:
            check()
        except Exception as error:
            failed += 1
            print(f"FAILED {check}: {error}", file=sys.stderr)
    print(f"{len(todo) - failed} of {len(todo)} checks hold")
    if failed:
        return 1
    options.write.parent.mkdir(parents=True, exist_ok=True)
    options.write.write_text(render(table(names)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
