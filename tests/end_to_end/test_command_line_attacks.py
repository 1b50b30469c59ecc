"""What a careless or hostile hand does at the command line ends in a message and exit code 2, and loses nothing."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock

import slimtune as st
from slimtune.cli.main import main
from slimtune.train.full_disk import reason
from slimtune.train.load_recipe import load_recipe
from slimtune.train.needs import packages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, a finished run and two adapters of it."""
    root = tmp_path_factory.mktemp("attacks")
    tiny.llama(root / "model")
    tiny.reviews(root / "data")
    recipe = recipe_in(root, "run")
    assert main(["train", str(recipe)]) == 0
    assert main(["convert", str(root / "run" / "out"), "-r", "1", "--out", str(root / "small")]) == 0
    return root


def recipe_in(world: Path, name: str, **more: object) -> Path:
    settings: dict[str, object] = {"max_steps": 2, "save_every": 1, "batch_size": 4, "r": 2} | more
    return tiny.recipe(world / name, model=world / "model", data=world / "data", name="a", **({"out": "out"} | settings))


def says(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in ("error:", *words):
        assert word in error, f"{word!r} is not in: {error}"
    return error


# ---- nothing is overwritten -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["combine", "convert", "extract", "merge"])
def test_no_command_writes_into_an_occupied_folder(command: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = world / "small"
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    arguments = {
        "combine": ["combine", str(adapter), "--out", str(adapter)],
        "convert": ["convert", str(adapter), "-r", "1", "--out", str(adapter)],
        "extract": ["extract", str(world / "model"), str(world / "model"), str(adapter), "-r", "1"],
        "merge": ["merge", str(world / "run" / "out"), "--out", str(adapter)],
    }
    assert main(arguments[command]) == 2
    says(capsys, "not empty", "hint:")
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


# ---- two runs in one folder -------------------------------------------------------------------------------------------
def test_the_second_run_in_a_folder_is_refused_and_the_first_goes_on(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, "twice")
    out = world / "twice" / "out"
    out.mkdir(parents=True)
    with FileLock(out / ".lock"):
        assert main(["train", str(recipe)]) == 2
        says(capsys, "another run is at work", str(out))
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert main(["train", str(recipe)]) == 0  # the hint: wait until it has ended
    assert not (out / ".lock").exists()


# ---- a full disk ------------------------------------------------------------------------------------------------------
FULL = """
import resource, signal, sys
from slimtune.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize("limit", [20_000, 3_000])
def test_a_disk_without_room_is_a_sentence(limit: int, world: Path) -> None:
    """Files may not grow beyond a limit: the adapter's tensors, or already the recipe of the run, cannot be written."""
    recipe = recipe_in(world, f"full{limit}", r=64)
    done = subprocess.run([sys.executable, "-c", FULL, str(recipe), str(limit)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "files may not get this large" in done.stderr or "could not be written" in done.stderr, done.stderr


def test_no_space_is_known_from_every_librarys_words(tmp_path: Path) -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device"), tmp_path) == "no space left"
    assert reason(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path) == "no space left"
    with pytest.raises(Exception) as caught:
        torch.save(torch.zeros(10_000), Full())
    assert reason(caught.value, tmp_path) is not None
    assert reason(ValueError("something else"), tmp_path) is None


class Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


# ---- hostile text -----------------------------------------------------------------------------------------------------
LEVELS = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in LEVELS)
HOSTILE = {
    "nested": "targets: " + "[" * 20_000 + "]" * 20_000 + "\n",
    "nested, but well-formed YAML in few words": "targets: " + "[" * 40 + "]" * 40 + "\n",
    "alias bomb": BOMB + "targets: *i\n",
    "an alias inside itself": "targets: &t [*t]\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(text: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, "hostile")
    recipe.write_text(recipe.read_text() + text)
    assert main(["check", str(recipe)]) == 2
    says(capsys)


def test_a_hostile_override_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe_in(world, "hostile2")), "targets=" + "[" * 60 + "]" * 60]) == 2
    says(capsys, "deep")


def test_a_syntax_error_is_the_only_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model: [x\ndata: y\n")
    assert main(["check", str(tmp_path / "r.yaml")]) == 2
    error = says(capsys, "not valid YAML")
    assert error.count("  - ") == 1


def test_escape_codes_do_not_reach_the_terminal(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, "codes")
    recipe.write_text(recipe.read_text() + '"k\\e[2J\\u202ekey": 1\n')
    assert main(["check", str(recipe)]) == 2
    error = says(capsys, r"k\x1b[2J\u202ekey")
    assert "\x1b" not in error
    assert "\u202e" not in error


# ---- damaged checkpoints ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_file_is_named_and_never_opened_unsafely(file: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, f"damaged-{file}", max_steps=3)
    assert main(["train", str(recipe)]) == 0
    out = recipe.parent / "out"
    shutil.rmtree(out / "checkpoints" / "step-000003")  # as if it had been killed
    for left in ("results.json", "summary.json"):
        (out / left).unlink()
    (out / "checkpoints" / "step-000002" / file).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert main(["train", str(recipe), "--resume"]) == 2
    error = says(capsys, "damaged", "step-", "resume from the one before")
    assert "weights_only" not in error


# ---- check refuses what train refuses ---------------------------------------------------------------------------------
def occupied(world: Path, recipe: Path) -> str:
    (recipe.parent / "out").mkdir()
    (recipe.parent / "out" / "notes.txt").write_text("mine")
    return "not empty"


def dangling_out(world: Path, recipe: Path) -> str:
    (recipe.parent / "out").symlink_to(recipe.parent / "gone")
    return "link"


def pickled(world: Path, recipe: Path) -> str:
    folder = other_model(world, recipe)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pickle"


def dangling_weights(world: Path, recipe: Path) -> str:
    folder = other_model(world, recipe)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")
    return "link"


def lfs_pointer(world: Path, recipe: Path) -> str:
    folder = other_model(world, recipe)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "git lfs pull"


def cut_short(world: Path, recipe: Path) -> str:
    folder = other_model(world, recipe)
    (folder / "model.safetensors").write_bytes(b"\xff\xff")
    return "cut short"


def other_model(world: Path, recipe: Path) -> Path:
    folder = tiny.llama(recipe.parent / "model")
    recipe.write_text(recipe.read_text().replace(str(world / "model"), str(folder)))
    return folder


@pytest.mark.parametrize("spoil", [occupied, dangling_out, pickled, dangling_weights, lfs_pointer, cut_short], ids=lambda f: f.__name__)
def test_check_refuses_what_train_refuses(spoil, tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path, model=world / "model", data=world / "data", name="a", out="out", max_steps=1, r=2)
    words = spoil(world, recipe)
    assert main(["check", str(recipe)]) == 2
    says(capsys, words)
    assert main(["train", str(recipe)]) == 2
    says(capsys, words)


def test_missing_packages_are_told_before_the_work(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(world, "needs", quantize="nf4")
    assert "bitsandbytes" in packages(load_recipe(recipe))
    for name in ("matplotlib", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", str(recipe)]) == 2
    says(capsys, "matplotlib, for the report's figures", "bitsandbytes, for quantize: nf4", "pip install 'slimtune[train,quant]'")
    assert not (recipe.parent / "out").exists()


# ---- a way on from every output ---------------------------------------------------------------------------------------
def test_what_convert_writes_generates_and_merges(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = str(world / "small")
    assert main(["generate", small, "--prompt", "red apple", "--max-new-tokens", "3"]) == 0
    assert main(["merge", small, "--out", str(tmp_path / "merged")]) == 0
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    st.load(base, small)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits.float(), base(ids).logits.float(), rtol=2e-2, atol=2e-2)
    assert main(["merge", str(world / "run" / "out"), "--model", "x", "--out", str(tmp_path / "n")]) == 2
    says(capsys, "--model goes with an adapter's folder")


def test_a_conversion_that_loses_much_warns(world: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    st.attach(model, st.LoRA(r=8), name="wide")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    assert "warning" in str(st.convert(model, "wide", to=st.LoRA(r=1), name="narrow"))
    assert "warning" not in str(st.convert(model, "wide", to=st.LoRA(r=8), name="same"))


@pytest.mark.parametrize("columns", [40, 79, 200])
def test_methods_can_be_read_at_any_width(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) < 200, "one word a line"
