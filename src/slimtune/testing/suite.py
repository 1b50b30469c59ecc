"""Checks: every property on every case for one method; run them all at once, or hand them to pytest one by one.

    from slimtune.testing import check_method, checks

    check_method("mine")                      # raises with a list of everything that does not hold

    @pytest.mark.parametrize("check", checks("mine"), ids=str)
    def test_mine(check):
        check()
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from slimtune.core.attach import attach
from slimtune.core.errors import SlimtuneError
from slimtune.core.registry import spec_class
from slimtune.core.spec import Spec
from slimtune.testing import algebra, training  # noqa: F401  (they register their properties)
from slimtune.testing.cases import CASES, Case, case
from slimtune.testing.properties import COMPILED, EVERY_PLAN, PROPERTIES, Property
from slimtune.testing.subject import Subject, bits, classes, refused

HOME = "Llama"  # the model on which a method's own defaults must work
REFUSED = "refused"  # the one check of a cell where a method cannot sit: every property of it would be the same refusal


@dataclass(frozen=True)
class Check:
    """One property of one method on one case; call it to check it."""

    label: str
    subject: Subject
    name: str
    run: Property

    def __call__(self) -> None:
        """Check it.

        Raises:
            AssertionError: the property does not hold.
        """
        self.run(self.subject)

    def __str__(self) -> str:
        return f"{self.label}-{self.subject.case}-{self.name}".replace(" ", "_")


def expected_problem(subject: Subject) -> str:
    """Return why spec and kind themselves say that the method cannot sit on the case, or ""."""
    return subject.expected_problem(_untouched(subject.case))


@functools.cache
def _untouched(c: Case) -> nn.Module:
    """Return a model of a case that is only looked at: whether a cell refuses is asked of each method when tests are collected."""
    return c.build()


def refused_there(s: Subject) -> None:
    """The property of a cell where a method cannot sit: it says so, and a method's own defaults work on a Llama."""
    assert s.case.name != HOME, f"the method's defaults do not work on a Llama: {expected_problem(s)}"
    refusal(s)


def refusal(s: Subject) -> SlimtuneError:
    """Assert that a method which cannot sit on a case says so, where and what to do, and leaves the model alone; return the error."""
    model = s.case.build()
    before, kinds = bits(model), classes(model)
    caught: list[SlimtuneError] = []
    with refused(SlimtuneError, what=f"{type(s.spec).__name__} on {s.case}", place=True):
        try:
            attach(model, s.placed(), name="a")
        except SlimtuneError as error:
            caught.append(error)
            raise
    assert bits(model) == before, "the refused attach changed the model"
    assert classes(model) == kinds, "the refused attach changed classes"
    assert "slim_state" not in model.__dict__, "the refused attach left its state behind"
    return caught[0]


def checks(method: str | Spec, *, cases: Iterable[Case] | None = None, compile_all: bool = False) -> list[Check]:
    """Return every check of one method: each property in the cells where it can sit, one refusal in each of the others.

    Args:
        method: a registered name (with its defaults), or a spec.
        cases: default: all of them.
        compile_all: compile on every case and under every plan (many seconds each), not one mixed batch on a tiny Llama only.
    """
    spec = spec_class(method)() if isinstance(method, str) else method
    label = method if isinstance(method, str) else spec.method
    found = []
    for c in CASES if cases is None else cases:
        subject = Subject(spec, c)
        if expected_problem(subject):
            found.append(Check(label, subject, REFUSED, refused_there))
            continue
        found += [Check(label, subject, name, run) for name, run in PROPERTIES.items()]
        if c.compiles and (compile_all or c.name == HOME):
            slow = COMPILED | EVERY_PLAN if compile_all else COMPILED
            found += [Check(label, subject, name, run) for name, run in slow.items()]
    return found


def check_method(method: str | Spec, *, cases: Iterable[str] | None = None, compile_all: bool = False) -> int:
    """Run the whole conformance suite on one method, your own too, and return the number of checks.

    Args:
        method: a registered name (its defaults are used), or a spec.
        cases: names of cases (see `slimtune.testing.CASES`); default: all.
        compile_all: compile on every case, not on a tiny Llama only.

    Raises:
        AssertionError: listing every property that does not hold.

    Example:
        >>> from slimtune.testing import check_method
        >>> check_method("lora", cases=["linear"]) > 10
        True
    """
    todo = checks(method, cases=None if cases is None else [case(c) for c in cases], compile_all=compile_all)
    failed = []
    for check in todo:
        try:
            check()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{check}: {type(error).__name__}: {error} ({at.filename.rsplit('/', 1)[-1]}:{at.lineno})")
    if failed:
        raise AssertionError(f"{len(failed)} of {len(todo)} checks failed:\n" + "\n".join(failed))
    return len(todo)
