"""The command line: help answers at once, mistakes end in a message and 2, and the small commands do what they say."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from small import jsonl, llama, reviews

from slimtune.cli import check as check_command
from slimtune.cli.main import app, main
from slimtune.core.errors import FileError
from slimtune.version import __version__

COMMANDS = sorted((c.name or c.callback.__name__).strip("_") for c in app.registered_commands if c.callback is not None)
SRC = str(Path(__file__).resolve().parents[2] / "src")


def shell(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([SRC, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "slimtune.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "model")
    jsonl(tmp_path / "rows.jsonl", reviews())
    (tmp_path / "r.yaml").write_text("model: model\ndata: rows.jsonl\nr: 2\nbatch_size: 4\nvalid_fraction: 0.25\n")
    return tmp_path


def test_every_command_is_there() -> None:
    known = ["init", "check", "train", "eval", "generate", "chat", "merge", "inspect", "methods", "demo", "combine", "convert", "extract"]
    assert sorted(known) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_half_a_second_with_an_example(command: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell(command, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert f"slimtune {command}" in done.stdout
    # The processor's time, not the wall's: the machine is busy with the other tests.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from slimtune.cli.main import main; main(['train', '--help']);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'yaml', 'numpy', 'slimtune.train') if m in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SRC, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.strip() == "[]"


def test_version_and_wrong_words() -> None:
    assert shell("--version").stdout.strip() == f"slimtune {__version__}"
    wrong = shell("trian")
    assert wrong.returncode == 2
    assert "train" in wrong.stderr
    for arguments in ([], ["check"], ["train"], ["merge", "run"], ["eval", "run", "--limit", "0"], ["check", "--nonsense"]):
        done = shell(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr


def test_a_mistake_is_a_message_a_hint_and_two(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "gone.yaml"]) == 2
    error = capsys.readouterr().err
    assert "error: there is no such recipe" in error
    assert "hint:" in error
    assert "Traceback" not in error


def test_ctrl_c_is_a_sentence_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_command, "run", stopped)
    assert main(["check", "r.yaml"]) == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"


def test_a_command_may_return_its_own_code_and_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_command, "run", lambda *_: 130)
    assert main(["check", "r.yaml"]) == 130

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(check_command, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["check", "r.yaml"])


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise FileError("no")

    monkeypatch.setattr(check_command, "run", wrong)
    monkeypatch.setenv("SLIMTUNE_TRACEBACK", "1")
    with pytest.raises(FileError):
        main(["check", "r.yaml"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lacks(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(check_command, "run", lacks)
    assert main(["check", "r.yaml"]) == 2
    assert "pip install 'slimtune[train]'" in capsys.readouterr().err


# ---- init -----------------------------------------------------------------------------------------------------------


def test_init_lists_and_copies_and_overwrites_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    names = re.findall(r"^(\w+)  ", capsys.readouterr().out, re.M)
    assert {"reviews", "classify", "chat", "instruct"} <= set(names)
    for name in names:
        assert main(["init", name]) == 0
    before = (world / "chat.yaml").read_text()
    assert main(["init", "chat"]) == 2
    assert (world / "chat.yaml").read_text() == before
    assert main(["init", "reviews", "--to", "mine.yaml"]) == 0
    assert main(["init", "reviews", "--to", "gone/mine.yaml"]) == 2
    assert main(["init", "revews"]) == 2
    assert "reviews" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reviews", "classify", "chat", "instruct"])
def test_the_examples_are_sound_and_their_sections_commented(world: Path, name: str) -> None:
    from slimtune.train.load_recipe import load_recipe

    assert main(["init", name]) == 0
    recipe = load_recipe(world / f"{name}.yaml")
    assert recipe.name == name
    text = (world / f"{name}.yaml").read_text()
    for section in ("model", "method", "data", "train", "output"):
        assert f"# --- {section} ---" in text
    assert yaml.safe_load(text)["model"].startswith("pypi:")
    # The same recipe on a small model goes through every check of rows and tokens.
    model = llama(world / "other", positions=512)
    assert main(["check", f"{name}.yaml", f"model={model}", "max_length=128", "limit_train=20"]) == 0


def test_init_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--schema"]) == 0
    assert '"batch_size"' in capsys.readouterr().out


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_tells_what_will_happen_and_writes_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(world.rglob("[!c]*"))
    assert main(["check", "r.yaml", "epochs=2"]) == 0
    out = capsys.readouterr().out
    for part in ("llama", "causal lm", "q_proj", "parameters train", "text+label", "18 rows", "10 steps of 4 rows", "adapter/"):
        assert part in out, part
    assert "answers: great, other" in out
    assert not (world / "runs").exists()
    assert [p for p in sorted(world.rglob("[!c]*")) if "cache" not in p.parts] == [p for p in before if "cache" not in p.parts]


def test_check_counts_what_attach_counts(world: Path) -> None:
    import slimtune
    from slimtune.cli.check import attach_empty
    from slimtune.train.load_recipe import load_recipe
    from slimtune.train.method_options import build_spec
    from slimtune.train.prepare import prepare

    recipe = load_recipe("r.yaml", ["init=pissa"] if "pissa" in _inits() else [])
    empty = attach_empty(prepare(recipe, empty=True), recipe)
    ready = prepare(recipe)
    spec = build_spec(recipe, ready.task)
    assert empty is not None
    assert spec is not None
    full = slimtune.attach(ready.model, spec, name="r")
    assert (empty.trainable, empty.total, len(empty.rows)) == (full.trainable, full.total, len(full.rows))


def _inits() -> list[str]:
    from slimtune.initialise import INITS

    return list(INITS)


def test_check_of_full_fine_tuning(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "r.yaml", "method=full", "r="]) == 0
    assert "100 %" in capsys.readouterr().out


# ---- inspect and methods --------------------------------------------------------------------------------------------


def test_inspect_data_shows_the_mask(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "data", "r.yaml", "--rows", "2", "--split", "valid"]) == 0
    out = capsys.readouterr().out
    assert "valid example 2" in out
    shown = re.findall(r"Answer:\[ (?:great|other)<im_end>\]", out.replace("|", ""))
    assert len(shown) == 2
    assert re.search(r"example 1: \d+ tokens, \d+ with loss", out)
    assert main(["inspect", "data", "r.yaml", "--split", "nonsense"]) == 2
    assert main(["inspect", "data"]) == 2


def test_inspect_data_colours_a_terminal() -> None:
    from small import tokenizer

    from slimtune.cli.inspect import paint

    words = tokenizer()
    ids = words("tea great")["input_ids"]
    text = paint(words, ids, [-100] * (len(ids) - 1) + ids[-1:], plain=False)
    styles = [str(span.style) for span in text.spans]
    assert "dim" in styles
    assert "black on green" in styles
    assert paint(words, ids, ids, plain=True).plain.startswith("[")


def test_inspect_an_adapter(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import slimtune
    from slimtune.train.models import load_model, resolve_model

    model, _ = load_model(resolve_model("model"), task="causal_lm", dtype="float32")
    slimtune.attach(model, slimtune.LoRA(r=3), name="a")
    slimtune.save(model, world / "adapter", name="a")
    assert main(["inspect", "adapter"]) == 0
    out = capsys.readouterr().out
    for part in ("lora", "rank", "3", "tensors", "float32", "sha256", "q_proj", "layer"):
        assert part in out, part
    file = world / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert main(["inspect", "adapter"]) == 2
    file.rename(world / "adapter" / "adapter_model.bin")
    assert main(["inspect", "adapter"]) == 2
    assert "pickle" in capsys.readouterr().err
    assert main(["inspect", "gone"]) == 2
    assert main(["inspect", "rows.jsonl"]) == 2
    assert main(["inspect", "model", "two"]) == 2


def test_methods_come_from_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    import slimtune

    assert isinstance(slimtune.cli, ModuleType)
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    from slimtune.core.registry import methods

    assert all(name in out for name in methods())
    assert main(["methods", "lora"]) == 0
    out = capsys.readouterr().out
    assert "2106.09685" in out
    assert "rank" in out
    assert main(["methods", "lara"]) == 2
    assert "lora" in capsys.readouterr().err


def test_inspect_an_adapter_of_another_library(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    (world / "other").mkdir()
    save_file(
        {f"base_model.model.h.{i}.mlp.lora_{r}.weight": torch.ones(2, 8) for i in range(2) for r in "AB"}, world / "other/adapter_model.safetensors"
    )
    (world / "other/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    assert main(["inspect", "other"]) == 0
    out = capsys.readouterr().out
    for part in ("another library", "rank", "2 x h.*.mlp", "norm of lora_B", "4"):
        assert part in out, part
