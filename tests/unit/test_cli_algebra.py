"""slimtune combine, convert, extract: from folders to a folder, equal to the same in Python; mistakes are messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import bert, llama
from torch import Tensor, nn

import slimtune as st
from slimtune.cli.main import main

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters of three methods on it, and a fine-tuned copy."""
    from transformers import AutoModelForCausalLM

    home = tmp_path_factory.mktemp("algebra")
    llama(home / "base")
    model = open_model(home / "base")
    draw = torch.Generator().manual_seed(0)
    for name, spec in (("a", st.LoRA(r=2)), ("b", st.IA3()), ("c", st.DoRA(of=st.LoRA(r=2)))):
        st.attach(model, spec, name=name)
        with torch.no_grad():
            for p in model.slim_state.adapters[name].parameters():  # type: ignore[union-attr, operator, index]
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.1)
        st.save(model, home / name, name=name)
    tuned = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.05)
    tuned.save_pretrained(home / "tuned")
    bert(home / "bert")
    return home


@pytest.fixture(autouse=True)
def there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def open_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def from_file(made: Path, name: str) -> Tensor:
    model = open_model(made / "base")
    st.load(model, made / name)
    return run(model)


def test_combine(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["combine", "a=0.5", "b=-2", "--out", str(tmp_path / "mix")]) == 0
    assert "exact" in capsys.readouterr().out
    model = open_model(made / "base")
    for name in "ab":
        st.load(model, made / name)
    with st.use(model, {"a": 0.5, "b": -2.0}):
        want = run(model)
    torch.testing.assert_close(from_file(made, str(tmp_path / "mix")), want, rtol=1e-4, atol=1e-5)
    assert main(["combine", "a", "b", "--how", "ties", "--density", "0.4", "-r", "3", "--out", str(tmp_path / "ties")]) == 0
    st.combine(model, {"a": 1, "b": 1}, how="ties", density=0.4, r=3, name="ties")
    with st.use(model, "ties"):
        torch.testing.assert_close(from_file(made, str(tmp_path / "ties")), run(model), rtol=1e-4, atol=1e-5)


def test_convert_then_combine(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["combine", "a", "c", "--out", str(tmp_path / "x")]) == 2
    assert "st.convert" in capsys.readouterr().err
    assert main(["convert", "c", "--energy", "1", "--out", str(tmp_path / "c")]) == 0
    torch.testing.assert_close(from_file(made, str(tmp_path / "c")), from_file(made, "c"), rtol=1e-4, atol=1e-5)
    assert main(["combine", "a", str(tmp_path / "c"), "--model", "base", "--out", str(tmp_path / "x")]) == 0
    assert main(["convert", "a", "-r", "1", "--out", str(tmp_path / "a")]) == 0
    assert "relative error" in capsys.readouterr().out


def test_extract(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "base", "tuned", str(tmp_path / "x"), "--energy", "1"]) == 0
    torch.testing.assert_close(from_file(made, str(tmp_path / "x")), run(open_model(made / "tuned")), rtol=1e-4, atol=1e-5)
    assert main(["extract", "base", "tuned", str(tmp_path / "y"), "-r", "2", "--targets", "q_proj,v_proj", "--leave-rest"]) == 0
    shown = capsys.readouterr().out
    assert "left out" in shown
    assert "rank: 2 (4 weights)" in shown


MISTAKES = {
    "no weight": (["combine", "a=x", "b", "--out", "new"], "is no weight"),
    "no such adapter": (["combine", "a", "z", "--out", "new"], "no folder z"),
    "no such way": (["combine", "a", "b", "--how", "mean", "--out", "new"], "no way to combine"),
    "no density": (["combine", "a", "b", "--how", "ties", "--out", "new"], "density="),
    "no rank": (["convert", "a", "--out", "new"], "-r"),
    "two ranks": (["convert", "a", "--out", "new", "-r", "2", "--energy", "0.5"], "either"),
    "odd rank": (["convert", "a", "--out", "new", "-r", "0"], "at least 1"),
    "another base": (["convert", "a", "--out", "new", "-r", "2", "--model", "bert"], "a"),
    "no base": (["convert", "a", "--out", "new", "-r", "2", "--model", "./gone"], "gone"),
    "no checkpoint": (["extract", "base", "gone", "new", "-r", "2"], "config.json"),
    "an adapter for a checkpoint": (["extract", "base", "a", "new", "-r", "2"], "config.json"),
    "no such target": (["extract", "base", "tuned", "new", "-r", "2", "--targets", "w_proj"], "matches no module"),
    "no rank to extract": (["extract", "base", "tuned", "new"], "--energy"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_messages(case: tuple[list[str], str], made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case[0]) == 2
    error = capsys.readouterr().err
    assert "error:" in error
    assert case[1] in error
    assert "Traceback" not in error
    assert not (made / "new").exists()
