"""The method shown in CONTRIBUTING.md, registered from outside the package, passes the whole conformance suite."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core import registry
from slimtune.testing import CASES, check_method, checks
from slimtune.testing.matrix import table

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def shown() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(block for block in blocks if "st.register" in block)


@pytest.fixture
def gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The block from the page, as somebody's own module."""
    (tmp_path / "somebodys_gain.py").write_text(shown())
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("somebodys_gain")
    yield module
    registry._SPECS.pop("gain")
    sys.modules.pop("somebodys_gain")


def test_the_example_is_short() -> None:
    assert len(shown().splitlines()) < 60


@pytest.mark.usefixtures("gain")
def test_the_example_passes_the_whole_suite() -> None:
    assert "gain" in st.methods()
    assert check_method("gain") == len(checks("gain")) > 300


@pytest.mark.usefixtures("gain")
def test_the_example_goes_where_it_says() -> None:
    cells = table(["gain"])["gain"]
    assert [name for name, cell in cells.items() if cell.refusal] == [
        c.name for c in CASES if c.name in {"embedding", "experts", "experts, transposed", "LayerNorm", "RMSNorm", "block"}
    ]
    assert all(cell.merge and cell.sum for cell in cells.values() if not cell.refusal)


def test_the_example_learns(gain: ModuleType) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16))
    x = torch.randn(64, 8)
    wanted = model(x).detach() * torch.linspace(0.5, 2, 16)
    st.attach(model, gain.Gain())
    optimiser = torch.optim.Adam(st.param_groups(model, lr=0.05))
    for _ in range(200):
        loss = (model(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1e-4
