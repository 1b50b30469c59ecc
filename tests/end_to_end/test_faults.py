"""Files under attack: 200 kills while saving, a full disk, and more than 500 damaged or hostile files."""

from __future__ import annotations

import copy
import errno
import json
import mmap
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import FileError, FormatError, MismatchError
from slimtune.files import container

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KILLS = 200


def base(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)))


# ---- kills -------------------------------------------------------------------------------------------------------------
def kill_loop(folder: Path, way: str, kills: int, seed: int) -> dict[str, int]:
    """Save in a loop in a forked child, kill it at a random moment, look at what is left; again and again.

    Save number k writes tensors that all hold k, with rank 4 or 8 by turns where `way` changes the config, too.
    """
    torch.set_num_threads(1)
    dice = random.Random(seed)
    model = base()
    for r in (4, 8):
        st.attach(model, st.LoRA(r=r), name=f"r{r}")
    adapters = model.slim_state.adapters
    counter = mmap.mmap(-1, 16)  # begun, finished
    seen = {"in a save": 0, "by the reference's reader": 0, "without config": 0}
    last = -1
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            k = struct.unpack("qq", counter[:])[0]
            while True:
                k += 1
                name = "r4" if way == "weights" or k % 2 else "r8"
                with torch.no_grad():
                    for p in adapters[name].parameters():
                        p.fill_(k)
                counter[:8] = struct.pack("q", k)
                st.save(model, folder, name=name)
                counter[8:] = struct.pack("q", k)
        time.sleep(dice.uniform(0.002, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        begun, finished = struct.unpack("qq", counter[:])
        seen["in a save"] += begun != finished
        if not finished and not (folder / WEIGHTS).exists():
            continue
        k, r = look(folder)
        assert finished <= k <= begun, f"{k} is in the folder, {finished} was finished, {begun} begun"
        assert k >= last, "an older adapter came back"
        assert way == "weights" or r == (4 if k % 2 else 8)
        last = k
        if (folder / CONFIG).exists():
            look_plainly(folder)
            seen["by the reference's reader"] += 1
        else:
            assert way == "shared folder"
            seen["without config"] += 1
    st.save(model, folder, name="r4")
    look_plainly(folder)
    return seen


def look(folder: Path) -> tuple[int, int]:
    """Return (k, rank) of the adapter in a folder, which must be whole."""
    model = base()
    st.load(model, folder, name="x")
    values = {float(v) for p in model.slim_state.adapters["x"].parameters() for v in p.unique()}
    assert len(values) == 1, f"a mixture: {values}"
    return int(values.pop()), next(iter(model.slim_state.adapters["x"].ops.values())).r


def look_plainly(folder: Path) -> None:
    """Read a folder as any other program would."""
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {config["r"]}


@pytest.mark.parametrize(("way", "kills"), [("config and weights", 100), ("weights", 50), ("shared folder", 50)])
def test_no_kill_loses_an_adapter(way: str, kills: int, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "adapter"
    if way == "shared folder":
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
    command = [sys.executable, __file__, str(folder), way, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["in a save"] > kills * 0.6, seen  # the kills really hit
    assert way == "shared folder" or seen["without config"] == 0
    if way == "shared folder":
        assert (folder / "tokenizer.json").read_text() == "{}"
    assert len(list(folder.parent.iterdir())) < 60, "what killed saves leave behind is swept"


# ---- a full disk --------------------------------------------------------------------------------------------------------
def saved(folder: Path, spec: st.Spec | None = None) -> tuple[nn.Module, dict[str, bytes]]:
    model = base()
    st.attach(model, spec or st.LoRA(r=4))
    fill(model)
    st.save(model, folder)
    return model, contents(folder)


def fill(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.slim_state.adapters["default"].parameters():
            p.normal_()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_disk_that_fails_at_any_step_leaves_the_old_adapter(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, old = saved(tmp_path / "a")
    fill(model, 2)
    st.save(model, tmp_path.parent / "new")
    new = contents(tmp_path.parent / "new")
    real = getattr(os, call)
    for nth in range(20):
        count = 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth + 1:  # noqa: B023  # called within this turn of the loop
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            said = ""
            try:
                st.save(model, tmp_path / "a")
            except FileError as error:
                said = str(error)
        if said:
            assert "No space left" in said
            assert contents(tmp_path / "a") in (old, new)
        else:  # perhaps in another way: not every step is needed
            assert contents(tmp_path / "a") == new
            if count <= nth:
                break
        assert st.load(base(), tmp_path / "a")
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    else:
        pytest.fail("it never came through")


def test_a_limit_on_file_size_leaves_the_old_adapter(tmp_path: Path) -> None:
    import resource
    model, old = saved(tmp_path / "a")
    fill(model, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(FileError, match="cannot write"):
            st.save(model, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert contents(tmp_path / "a") == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ---- damaged and hostile files ------------------------------------------------------------------------------------------
SPECS = {
    "lora": st.LoRA(r=4, rank_pattern={"0.0": 2}, train_modules=("1.2",), targets=("0.0", "0.2", "1.0")),
    "bottleneck": st.Bottleneck(targets="all-linear", reduction=4),
    "bitfit": st.BitFit(),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    out = {}
    for name, spec in SPECS.items():
        folder = tmp_path_factory.mktemp("original") / name
        saved(folder, spec)
        out[name] = (folder, tensors_of(reload(folder)))
    return out


def reload(folder: Path) -> nn.Module:
    model = base()
    st.load(model, folder, name="x")
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    (adapter,) = model.slim_state.adapters.values()
    return {f"{key}.{n}": t for key, op in adapter.ops.items() for n, t in nn.Module.state_dict(op).items()}


def assault(folder: Path, want: dict[str, torch.Tensor] | None, model: nn.Module | None = None) -> str:
    """Load a file: our own error and an untouched model, or (if `want` is given) exactly the tensors that were saved."""
    model = model or base()
    classes = {n: type(m) for n, m in model.named_modules()}
    started = time.time()
    said: FileError | None = None
    try:
        st.load(model, folder, name="x")
    except FileError as error:
        said = error
    assert time.time() - started < 5
    if said is not None:
        assert not hasattr(model, "slim_state")
        assert {n: type(m) for n, m in model.named_modules()} == classes
        assert said.what
        assert said.where
        return type(said).__name__
    assert want is not None, "a hostile file was loaded"
    got = tensors_of(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want), "loaded, but silently different"
    return "equal"


@pytest.mark.parametrize("spec", SPECS)
def test_flips_cuts_and_splices(spec: str, originals: dict[str, Any], tmp_path: Path) -> None:
    folder, want = originals[spec]
    dice = random.Random(spec)
    results: dict[str, int] = {}
    for turn in range(260):
        victim = tmp_path / str(turn)
        shutil.copytree(folder, victim)
        path = victim / (CONFIG if turn % 5 == 0 else WEIGHTS)
        raw = bytearray(path.read_bytes())
        how = turn % 4
        at = dice.randrange(min(len(raw), 6000) if turn % 3 else len(raw))
        if how == 0:
            raw[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del raw[at:]
        elif how == 2:
            for _ in range(dice.randrange(2, 6)):
                raw[dice.randrange(len(raw))] = dice.randrange(256)
        elif dice.random() < 0.5:
            del raw[at : at + dice.randrange(1, 9)]
        else:
            raw[at:at] = dice.randbytes(dice.randrange(1, 9))
        path.write_bytes(raw)
        result = assault(victim, want)
        results[result] = results.get(result, 0) + 1
        shutil.rmtree(victim)
    assert sum(results.values()) == 260
    assert results.get("equal", 0) < 60, results  # flips in descriptive fields of the config, or bytes replaced by themselves
    assert results["FormatError"] > 150, results


def forged(folder: Path, to: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """Write a file whose content was changed and whose checksum fits again."""
    shutil.copytree(folder, to)
    file = container.read_tensors(folder / WEIGHTS)
    tensors = {n: file.tensor(n).clone() for n in file.entries}
    about = json.loads(file.metadata[container.OWN])
    change(about, tensors)
    container.write_tensors(to / WEIGHTS, tensors, {"format": "pt", container.OWN: json.dumps(about)})
    return to


def forgeries(dice: random.Random) -> Iterator[tuple[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]]]:
    names = ["../../etc/passwd", "..", "slim", "0.slim", "__class__", "forward", "", "0.9.weight", "0" * 500, "a\x00b", "0..0", ".0", "weight", "0.1"]
    junk: list[Any] = [None, True, -1, 0, 1.5, "x", [], {}, [[[]]], 10**30, {"method": "lora"}, "../..", 2**23]

    def pick(tensors: dict[str, torch.Tensor]) -> str:
        return dice.choice(sorted(tensors))

    for _ in range(6):
        yield "lost tensor", lambda a, t: t.__delitem__(pick(t))
        yield "extra tensor", lambda a, t: t.update({pick(t) + "x": torch.zeros(2)})
        yield "renamed", lambda a, t: t.update({pick(t)[:-1]: t.pop(pick(t))})
        yield "transposed or longer", lambda a, t: t.update({(n := pick(t)): torch.cat([t[n].reshape(-1), torch.zeros(1)])})
        yield "cut", lambda a, t: t.update({(n := pick(t)): t[n].reshape(-1)[:-1]})
        yield "integers", lambda a, t: t.update({(n := pick(t)): t[n].to(torch.int32)})
        yield "more dimensions", lambda a, t: t.update({(n := pick(t)): t[n][None]})
        yield "scalar", lambda a, t: t.update({pick(t): torch.tensor(1.0)})
        yield "empty", lambda a, t: t.update({pick(t): torch.zeros(0, 3)})
        yield "a place less", lambda a, t: a["places"].__delitem__(dice.randrange(len(a["places"])))
        yield "a place twice", lambda a, t: a["places"].append(a["places"][0])
    for name in names:
        yield "path", lambda a, t, name=name: a["places"][0].update(path=name)
        if name == "weight":
            continue  # that is right
        yield "param", lambda a, t, name=name: a["places"][0].update(param=name)
    for value in junk:
        for field in ("path", "port", "param", "method"):
            yield field, lambda a, t, v=value, f=field: a["places"][0].update({f: v if v != "x" else "y"})
        yield "place", lambda a, t, v=value: a["places"].__setitem__(0, v)
        yield "places", lambda a, t, v=value: a.update(places=v)
        yield "spec", lambda a, t, v=value: a.update(spec=v if v != {"method": "lora"} else {"method": "none"})
        yield "method", lambda a, t, v=value: a["spec"].update(method=v)
        yield "unknown field", lambda a, t, v=value: a["spec"].update(wormhole=v)
        yield "fingerprint", lambda a, t, v=value: a.update(fingerprint=v)
        yield "types", lambda a, t, v=value: a["fingerprint"].update(types=v)
        yield "values", lambda a, t, v=value: a["fingerprint"].update(values=v)
        yield "format", lambda a, t, v=value: a.update(slimtune_format=v)
        yield "type", lambda a, t, v=value: a.update(type=v)
        yield "setting", lambda a, t, v=value: a["places"][0].update(settings={"r": v, "m": v})
        yield "same", lambda a, t, v=value: a.update(same=v if v != {} else {"base_model.model.0.0": "nothing"})
    for field in ("places", "spec", "fingerprint", "same", "type", "slimtune_format", "config", "name"):
        yield "no field", lambda a, t, f=field: a.__delitem__(f)


@pytest.mark.parametrize("spec", ["lora", "bottleneck"])
def test_forged_files_with_a_good_checksum(spec: str, originals: dict[str, Any], tmp_path: Path) -> None:
    folder, want = originals[spec]
    count = 0
    for label, change in forgeries(random.Random(spec)):
        victim = forged(folder, tmp_path / str(count), change)
        harmless = label in {"no field", "a place less"} and _harmless(victim)
        try:
            assault(victim, want if harmless else None)
        except BaseException as error:
            raise AssertionError(f"{label}: {error!r}") from error
        shutil.rmtree(victim)
        count += 1
    assert count > 250


def _harmless(victim: Path) -> bool:
    """The name is only a default."""
    return "name" not in json.loads(container.read_tensors(victim / WEIGHTS).metadata[container.OWN])


class Exploit:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/slimtune_was_here",))


def header(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + data


ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
RAW: dict[str, bytes] = {
    "nothing": b"",
    "nine bytes": b"\x01" + b"\x00" * 7 + b"{",
    "zeros": bytes(4096),
    "text": b"hello " * 100,
    "pickle": pickle.dumps(Exploit()),
    "old pickle": pickle.dumps({"a": 1}, protocol=2) + bytes(100),
    "huge header": (2**63).to_bytes(8, "little") + b"{}" + bytes(100),
    "header of all but one byte": (91).to_bytes(8, "little") + b"{" + bytes(99),
    "no json": header("{nope"),
    "a list": header("[1,2]"),
    "deep json": header("[" * 100_000),
    "deep objects": header('{"a":' * 50_000 + "1" + "}" * 50_000),
    "long number": header('{"a":' + "9" * 100_000 + "}"),
    "nan": header('{"__metadata__":{"format":NaN}}'),
    "not utf-8": header(b'{"\xff\xfe":1}'),
    "surrogate": header('{"\\ud800":' + ONE + "}", bytes(4)),
    "key twice": header('{"a":' + ONE + ',"a":' + ONE + "}", bytes(4)),
    "overlap": header('{"a":' + ONE + ',"b":' + ONE + "}", bytes(4)),
    "gap": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "beyond the end": header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(4)),
    "backwards": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
    "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "true as a number": header('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)),
    "overflow": header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "many dimensions": header('{"a":{"dtype":"F32","shape":[' + ",".join(["1"] * 5000) + '],"data_offsets":[0,4]}}', bytes(4)),
    "unknown dtype": header('{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "no dtype": header('{"a":{"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata of numbers": header('{"__metadata__":{"a":1},"a":' + ONE + "}", bytes(4)),
    "metadata is a list": header('{"__metadata__":[],"a":' + ONE + "}", bytes(4)),
    "trailing bytes": header('{"a":' + ONE + "}", bytes(40)),
    "no tensors": header("{}"),
    "path in a name": header('{"../../../tmp/x":' + ONE + "}", bytes(4)),
    "slash in a name": header('{"/etc/passwd":' + ONE + "}", bytes(4)),
    "nul in a name": header('{"a\\u0000b":' + ONE + "}", bytes(4)),
    "empty name": header('{"":' + ONE + "}", bytes(4)),
    "endless name": header('{"' + "a" * 100_000 + '":' + ONE + "}", bytes(4)),
    "hostile module": header('{"base_model.model.__class__.lora_A.weight":' + ONE + "}", bytes(4)),
    "root": header('{"base_model.model.lora_A.weight":' + ONE + "}", bytes(4)),
    "only a B": header('{"base_model.model.0.0.lora_B.weight":' + ONE + "}", bytes(4)),
    "other prefix": header('{"base_model.model.0.0.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":' + ONE + "}", bytes(4)),
    "many empty tensors": header("{" + ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(20_000)) + "}"),
}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("foreign", [True, False])
def test_hostile_bytes(case: str, foreign: bool, originals: dict[str, Any], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    shutil.copytree(originals["lora"][0], victim)
    (victim / WEIGHTS).write_bytes(RAW[case])
    if foreign:
        (victim / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["0"]}))
    assert assault(victim, None) in {"FormatError", "MismatchError", "FileError"}
    assert not Path("/tmp/slimtune_was_here").exists()


CONFIGS: dict[str, str | bytes] = {
    "nothing": "", "a list": "[]", "a number": "7", "null": "null", "cut": '{"peft_type": "LORA"', "deep": "[" * 100_000, "not utf-8": b"\xff\xff",
    "twice": '{"peft_type":"LORA","peft_type":"LORA"}', "no type": "{}", "type is a list": '{"peft_type":["LORA"]}',
    "other type": '{"peft_type":"VOODOO"}',
    "lower case": '{"peft_type":"lora"}', "own type": '{"peft_type":"SLIMTUNE_BITFIT"}', "infinity": '{"peft_type":"LORA","lora_alpha":Infinity}',
    **{f"{k}={v}": json.dumps({"peft_type": "LORA", "target_modules": ["0"], k: v}) for k, v in [
        ("r", 0), ("r", -4), ("r", "4"), ("r", 1.5), ("r", True), ("r", 10**40), ("r", [4]), ("lora_alpha", "x"),
        ("lora_alpha", [1]), ("lora_alpha", 1e300),
        ("lora_dropout", 2), ("lora_dropout", "a"), ("use_rslora", "yes"), ("bias", "some"), ("bias", 3), ("target_modules", 5),
        ("target_modules", "("),
        ("target_modules", [1]), ("target_modules", {"a": 1}), ("target_modules", "(a+)+$"), ("exclude_modules", "["), ("modules_to_save", "score"),
        ("modules_to_save", ["("]), ("rank_pattern", [1]), ("rank_pattern", {"(": 2}), ("rank_pattern", {"a": 0}), ("rank_pattern", {"a": "b"}),
        ("rank_pattern", {"(.*)*x": 2}), ("alpha_pattern", {"a": None}), ("alpha_pattern", {"[": 1}),
        ("layers_to_transform", "all"), ("layers_to_transform", [0.5]),
        ("layers_pattern", 3), ("use_dora", True), ("target_parameters", "x"), ("target_parameters", [1]),
        ("trainable_token_indices", [1]), ("lora_bias", 1),
        ("init_lora_weights", "pissa"), ("init_lora_weights", {"a": 1}), ("init_lora_weights", 3), ("unheard_of", 1), ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]), ("arrow_config", {"x": 1}), ("peft_version", [1]),
    ]},
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(case: str, originals: dict[str, Any], tmp_path: Path) -> None:
    """Beside a file of ours the config must be the one it was saved with; beside a foreign one it must make sense."""
    text = CONFIGS[case]
    for foreign in (False, True):
        victim = tmp_path / str(foreign)
        shutil.copytree(originals["lora"][0], victim)
        if foreign:
            tensors = {"base_model.model.0.0.lora_A.weight": torch.ones(8, 16), "base_model.model.0.0.lora_B.weight": torch.ones(16, 8)}
            _plain(victim / WEIGHTS, tensors)
        (victim / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
        assault(victim, None)


def _plain(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in tensors.items()}, path, {"format": "pt"})


def test_foreign_files_with_wrong_tensors(tmp_path: Path) -> None:
    good = {"base_model.model.0.0.lora_A.weight": torch.ones(4, 16), "base_model.model.0.0.lora_B.weight": torch.ones(16, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["0.0"]}
    bad: list[dict[str, torch.Tensor]] = []
    for name, t in good.items():
        bad += [{**good, name: v} for v in (t[:-1], t[:, :-1], t[None], t.T, t.int(), t.bool(), t.reshape(-1), t[:0])]
        bad += [{k: v for k, v in good.items() if k != name}]
        bad += [{**good, name.replace("0.0", p): t} for p in ("0.1", "0.9", "9.0", "0.0.slim", "x", "0.0.weight", "1.2")]
        bad += [{**good, name.replace("lora_", p): t} for p in ("lora_embedding_", "lora_C_", "hada_")]
        extras = ("lora_B.bias2", "bias", "weight", "lora_magnitude_vector", "base_layer.weight")
        bad += [{**good, f"base_model.model.0.0.{extra}": torch.ones(16)} for extra in extras]
    for i, tensors in enumerate(bad):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(config))
        _plain(folder / WEIGHTS, {k: v.contiguous() for k, v in tensors.items()})
        assault(folder, None)
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    _plain(folder / WEIGHTS, good)
    assert len(st.load(base(), folder).rows) == 1


def test_another_base(originals: dict[str, Any], tmp_path: Path) -> None:
    trained = base()
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(torch.randn_like(p), alpha=1e-3)
    for name in SPECS:
        for other in (base(seed=5), base(width=8), trained, base()[0], nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 16)):
            with pytest.raises((MismatchError, FormatError), match=r"base|does not have|shape"):
                st.load(other, originals[name][0])
            assert not hasattr(other, "slim_state")
        copied = copy.deepcopy(trained)
        assert any("another base" in note for note in st.load(copied, originals[name][0], relax="base").notes)


def test_pickles_zips_and_links(originals: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(originals["lora"][0] / CONFIG, folder)
    torch.save({"a": torch.ones(2)}, folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="pickle") as caught:
        st.load(base(), folder)
    assert "python -c" in caught.value.hint
    line = caught.value.hint.split(": ", 1)[1].replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, cwd=folder, check=True, capture_output=True)
    assert (folder / WEIGHTS).exists()  # the one line does convert it

    os.rename(folder / "adapter_model.bin", folder / WEIGHTS)
    with pytest.raises(FormatError, match="pickle"):
        st.load(base(), folder)
    with zipfile.ZipFile(folder / WEIGHTS, "w") as z:
        z.writestr("x", "y")
    with pytest.raises(FormatError, match="pickle"):
        st.load(base(), folder)

    for target in ("/etc/passwd", "/dev/zero", "../secret", "nowhere", WEIGHTS):
        (folder / WEIGHTS).unlink()
        (tmp_path / "secret").write_bytes((originals["lora"][0] / WEIGHTS).read_bytes())
        os.symlink(target, folder / WEIGHTS)
        assault(folder, None)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assault(folder, None)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assault(folder, None)


def test_the_hub_cache_is_made_of_links(originals: dict[str, Any], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--adapter" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, p in enumerate(originals["lora"][0].iterdir()):
        shutil.copy(p, blobs / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / p.name)
    assert st.load(base(), snapshot).rows


if __name__ == "__main__":
    print(json.dumps(kill_loop(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), 0)))
