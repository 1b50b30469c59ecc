"""Of a list of checks, those about compiled models."""

from __future__ import annotations

from slimtune.testing import Check
from slimtune.testing.suite import COMPILED, EVERY_PLAN, REFUSED


def run_compiled(found: list[Check]) -> None:
    """Run the checks about compiled models, or the refusal where the method has no place: none can be lost in silence."""
    wanted = {REFUSED} if [check.name for check in found] == [REFUSED] else {*COMPILED, *EVERY_PLAN}
    there = {check.name: check for check in found if check.name in wanted}
    assert set(there) == wanted, f"a check of compiled models is missing: {sorted(wanted - set(there))}"
    for check in there.values():
        check()
