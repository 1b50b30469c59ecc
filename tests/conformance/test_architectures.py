"""Every method with its defaults on the real classes: some cells in each run, all of them in `make test-all`."""

from pathlib import Path

import pytest

import slimtune as st
from slimtune.testing.architectures import CHECKS, failures, render, run_cell, stated, table
from slimtune.testing.matrix import own_methods
from slimtune.testing.zoo import ARCHITECTURES, architecture

FILE = Path(__file__).parents[2] / "docs" / "architectures.md"
WRITE = f"run: python -m slimtune.testing.architectures --write {FILE}"
NAMES = [a.name for a in ARCHITECTURES]
# LoRA everywhere, and each other method on three models, others for each.
QUICK = [("lora", name) for name in NAMES]
QUICK += [(m, NAMES[(5 * i + 10 * k) % len(NAMES)]) for i, m in enumerate(own_methods()) for k in range(3) if m != "lora"]


def check(method: str, name: str) -> None:
    outcome = run_cell(st.methods()[method](), architecture(name))
    assert not outcome.failures, f"{method} on {name}: {outcome.failures}"
    assert stated(FILE.read_text()).get((name, method)) == outcome.words(), WRITE


@pytest.mark.parametrize(("method", "name"), QUICK)
def test_cell(method: str, name: str) -> None:
    check(method, name)


@pytest.mark.slow
@pytest.mark.parametrize("method", own_methods())
@pytest.mark.parametrize("name", NAMES)
def test_every_cell(name: str, method: str) -> None:
    check(method, name)


def test_the_page_has_every_cell() -> None:
    page = stated(FILE.read_text())
    assert set(page) == {(name, method) for name in NAMES for method in own_methods()}, WRITE
    for (name, method), words in page.items():
        assert words[0] in {"yes", "no"}, f"{method} on {name}"
        assert words[0] == "yes" or len(words[1]) > 20, f"{method} on {name}: a refusal needs a reason"
    for method in own_methods():
        assert sum(words[0] == "yes" for (_, m), words in page.items() if m == method) > 1, f"{method} works almost nowhere"


def test_the_page_can_be_read_back() -> None:
    cells = table(["lora", "bottleneck"], [architecture("DeBERTa-v2"), architecture("nn.Sequential (MLP)")])
    assert not failures(cells)
    assert {key: cells[key[0]][key[1]].words() for key in stated(render(cells))} == stated(render(cells))
    assert len(stated(render(cells))) == 4


def test_a_method_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain on the merged weight only: every other check still holds."""
    from slimtune.methods.lora import LoRAOp

    own = LoRAOp.delta
    monkeypatch.setattr(LoRAOp, "delta", lambda self: own(self) * 1.01)
    outcome = run_cell(st.LoRA(), architecture("BERT"))
    assert list(outcome.failures) == ["merge = forward, unmerge restores the bits"]
    assert len(CHECKS) == 9
