"""The committed support matrix is what the methods declare now."""

from pathlib import Path

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
