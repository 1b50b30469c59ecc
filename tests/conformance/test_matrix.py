"""The committed support matrix is what the methods declare now."""

from pathlib import Path

from slimtune.testing import PROPERTIES, checks
from slimtune.testing.cases import case
from slimtune.testing.matrix import main, own_methods, render, table

FILE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


def test_the_matrix_is_up_to_date() -> None:
    assert main(["--check", str(FILE)]) == 0, f"run: python -m slimtune.testing.matrix --write {FILE}"


def test_a_changed_capability_shows(tmp_path: Path) -> None:
    stale = tmp_path / "matrix.md"
    stale.write_text(render(table(["lora"])).replace("yes", "no"))
    assert main(["--check", str(stale)]) == 1


def test_every_method_goes_somewhere() -> None:
    for name, cells in table(own_methods()).items():
        assert [c for c, cell in cells.items() if not cell.refusal], f"{name} fits no case"


def test_the_page_counts_distinct_checks() -> None:
    """What the page promises is what runs: as many checks as it says, and no two of them the same."""
    names = [str(check) for method in own_methods() for check in checks(method)]
    assert len(set(names)) == len(names)
    assert f"{len(names):,} checks, no two alike" in FILE.read_text()


def test_a_cell_that_refuses_is_checked_once() -> None:
    assert [check.name for check in checks("lora", cases=[case("block")])] == ["refused"]
    assert [check.name for check in checks("lora", cases=[case("linear")])] == list(PROPERTIES)
