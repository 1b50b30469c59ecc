"""`st.save` and `st.load`: one adapter, one folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.changed import check_hosts
from slimtune.core.elsewhere import at_hand, gathered, is_fsdp, whole
from slimtune.core.errors import FileError, FormatError, MismatchError, NoSuchAdapter, SlimtuneError, SpecError, closest
from slimtune.core.finite import non_finite
from slimtune.core.fresh import fresh_modules
from slimtune.core.placing import check_free, install, kind_at, put_to_use
from slimtune.core.report import Report, make_report
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, state_of, unwrap
from slimtune.files.card import card, is_ours
from slimtune.files.container import (
    CONVERT,
    MAX_JSON,
    OWN,
    TensorFile,
    check_sum,
    own_metadata,
    parse_json,
    read_bytes,
    read_tensors,
    write_tensors,
)  # fmt: skip
from slimtune.files.fingerprint import Fingerprint, fingerprint
from slimtune.files.hub import FILES, located
from slimtune.files.layouts.base import PREFIX, Layout, Place, Taker
from slimtune.files.layouts.generic import Generic
from slimtune.files.layouts.registry import layout_for, layout_of
from slimtune.files.place import make_ops, not_finite, one_error, ready
from slimtune.files.publish import publish
from slimtune.version import __version__

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT = 1
RELAX = ("base", "checksum", "config", "missing", "nonfinite", "unexpected")
RELAX_BASE = ", or, if you know what you do: st.load(..., relax='base')"
# Fields of the config that say nothing about the adapter's function; people and hubs rewrite them.
_ABOUT = {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode"}


def save(model: nn.Module, folder: str | Path, *, name: str | None = None) -> Path:
    """Write an adapter to a folder: readable by the reference library where it has the method, and the same bytes every time.

    Args:
        model: a model with adapters.
        folder: made if missing. Whatever happens, it holds either the old adapter or the new one.
        name: which adapter; default: the one in use, or the only one.

    Returns:
        The folder.

    Raises:
        NoSuchAdapter: no such adapter, or it is not clear which.
        FileError: the folder cannot be written, or the adapter holds NaN or infinity; what was there is untouched.

    Example:
        >>> st.save(model, "out/support", name="support")  # doctest: +SKIP
    """
    if is_fsdp(model):
        with gathered(model) as whole_model:
            return _save(whole_model, Path(folder), name)
    adapter = state_of(model).adapter(_which(unwrap(model)) if name is None else name)
    if any(hasattr(p, "_fsdp_flattened") for p in adapter.parameters()):
        raise FileError(
            "FullyShardedDataParallel holds a part of each of this adapter's tensors in each process",
            where=str(folder),
            hint="pass the wrapper, in every process: st.save(wrapper, folder)",
        )
    return _save(unwrap(model), Path(folder), adapter.name)


def _save(model: nn.Module, folder: Path, name: str | None) -> Path:
    state = state_of(model)
    adapter = state.adapter(_which(model) if name is None else name)
    check_hosts(model, adapter)
    undo = None
    if state.merged:  # full weights and the fingerprint are those of the base itself
        from slimtune.algebra.merge import lifted

        undo = lifted(model)
    try:
        config, tensors, metadata = pack(model, adapter)
    finally:
        if undo is not None:
            undo()
    if bad := non_finite(tensors.items()):
        raise FileError(
            f"adapter {adapter.name!r} holds NaN or infinity, so it is not written: {', '.join(name.removeprefix(PREFIX) for name in bad[:8])}",
            where=str(folder),
            hint="what was in the folder is untouched; go back to the last good checkpoint, and train with a lower lr",
        )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write(stage: Path) -> None:
        (stage / CONFIG).write_text(text, encoding="utf-8")
        write_tensors(stage / WEIGHTS, tensors, metadata)
        old = folder / CARD
        keep = old.is_file() and not is_ours(old)
        (stage / CARD).write_bytes(old.read_bytes() if keep else card(adapter, config, sum(t.numel() for t in tensors.values())).encode())

    publish(folder, write, last=WEIGHTS, alone=frozenset({CONFIG, WEIGHTS, CARD}))
    return folder


def _which(model: nn.Module) -> str:
    state = state_of(model)
    names = [n for n in state.adapters if n in state.current().names] or list(state.adapters)
    if len(names) != 1:
        raise NoSuchAdapter(f"which adapter? There are {', '.join(names)}", hint=f"st.save(model, folder, name={names[0]!r})")
    return names[0]


def pack(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return config, tensors and metadata of an adapter's files."""
    layout = layout_for(adapter, model)
    places = [
        Place(path, key, op.port, op.param, op.method, op.settings(), op.part, op.entrance) for (path, key), op in adapter.ops.items()
    ]
    layout.prepare(places, model)
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for place in places:
        module = model.get_submodule(place.path)
        op = adapter.ops[(place.path, place.key)]
        with at_hand(module) if place.port == "weight" else contextlib.nullcontext():
            put = layout.codec(place.method).put(place, op, module, kind_at(module))
        for short, sharded in put.items():
            t = whole(sharded)
            key, name = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (layout.stored(short),), layout.stored(short)
            if isinstance(layout, Generic) and first.setdefault(key, name) != name:
                same[name] = first[key]  # several ops share one tensor: it is written once
                continue
            if name in tensors and (tensors[name].data_ptr(), tensors[name].shape) != (t.data_ptr(), t.shape):
                raise FileError(f"two tensors of the adapter would be called {short!r} in the file", hint="tell us: this is a bug of slimtune")
            tensors[name] = t
    config = layout.config(adapter, model)
    about = {
        "slimtune_format": FORMAT,
        "version": __version__,
        "name": adapter.name,
        "type": config["peft_type"],
        "config": config_digest(config),
        "spec": adapter.spec.to_dict(),
        "places": [asdict(p) for p in places],
        "same": same,
        "fingerprint": fingerprint(model, without=_full(places)).to_dict(),
    }
    if adapter.steps or adapter.total_steps:
        about["trained"] = {"steps": adapter.steps, "total": adapter.total_steps}
    return config, tensors, {"format": "pt", OWN: json.dumps(about, sort_keys=True, separators=(",", ":"))}


def _full(places: Iterable[Place]) -> list[str]:
    """Return the modules whose base values do not matter, since the file holds them in full, or those of them that may be new."""
    return sorted({p.path for p in places if p.method in {"dense", "trainable_tokens"}})


def config_digest(config: dict[str, Any]) -> str:
    """Return a digest of the fields of adapter_config.json that decide what the adapter does."""
    decisive = {k: v for k, v in config.items() if k not in _ABOUT}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


# ---- loading ----------------------------------------------------------------------------------------------------------
def load(
    model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = False, dtype: torch.dtype | None = None,
    relax: str | Iterable[str] = (), revision: str | None = None,
) -> Report:  # fmt: skip
    """Read an adapter from a folder and put it onto a model; if anything is wrong, the model stays as it is.

    Args:
        model: the base the adapter was made for; it may carry other adapters.
        folder: written by `save`, or by the reference library; or the name of a repository on the Hugging Face hub ("user/adapter"), where no
            folder of that name is here. Its two files are fetched, with huggingface_hub.
        name: the adapter's name here; default: the one it was saved under, else "default".
        trainable: go on training it: it comes into use, and every other adapter and the base are frozen.
        dtype: of its parameters; default as in `attach`.
        relax: what to let pass, with a note in the report: "base" (made for another base), "checksum" (bytes have changed),
            "config" (unknown config fields, or a config that was edited), "missing" (targeted modules without tensors), "nonfinite"
            (tensors that hold NaN or infinity), "unexpected" (tensors that belong nowhere).
        revision: branch, tag or commit of the repository.

    Returns:
        A report. The first adapter on a model comes into use at once; later ones wait for `use`.

    Raises:
        FormatError: the files are damaged, hostile, or of a kind that slimtune does not read.
        MismatchError: they do not fit this model.
        FileError: they cannot be read.
        InvalidName, NameInUse, MergeError: the name is taken, or none; something is merged.

    Example:
        >>> st.load(model, "out/support")  # doctest: +SKIP
    """
    model = unwrap(model)
    allowed = _relaxed(relax)
    if name is not None:
        check_free(model, name)
    folder = located(folder, revision)
    file, about, config, notes = read(folder, allowed)
    with one_error(str(folder)):
        if about is not None:
            spec, places, taker, layout = _own(file, about)
            ready(model, spec, places)
            notes += _same_base(model, about, places, folder, allowed)
        else:
            assert config is not None
            layout = layout_of(str(config.get("peft_type")), folder)
            spec, places, taker = layout.discover(config, file, model, allowed)
            ready(model, spec, places)
        trained = _trained(about)
    if name is None:
        name = str(about["name"]) if about is not None else "default"
        check_free(model, name)
    elif model.__dict__.get("slim_state") is None:
        check_free(model, name)
    with one_error(str(folder)):
        made = make_ops(model, spec, places, layout, taker, dtype)
    if taker.left:
        if "unexpected" not in allowed:
            raise MismatchError(
                f"{len(taker.left)} tensor(s) of the file belong to nothing that its config describes: {', '.join(list(taker.left)[:8])}",
                where=str(file.path),
                hint="is it the right base? To leave them out: st.load(..., relax='unexpected')",
            )
        notes.append(f"{len(taker.left)} tensors of the file were left out: {', '.join(list(taker.left)[:4])}")
    notes += taker.notes
    if bad := taker.not_finite() or not_finite(made):
        what = f"{len(bad)} tensor(s) of the file hold NaN or infinity: {', '.join(bad[:8])}"
        if "nonfinite" not in allowed:
            hint = "load an earlier checkpoint of it; to look at this one as it is: st.load(..., relax='nonfinite')"
            raise FormatError(what, where=str(file.path), hint=hint)
        notes.append(what)
    first = "slim_state" not in model.__dict__
    adapter = install(model, name, spec, made, trainable=trainable)
    if first or trainable:
        put_to_use(model, adapter)
    adapter.meta = {"folder": str(folder), "own": about is not None}
    adapter.steps, adapter.total_steps = trained
    return make_report(model, adapter, notes)


def _relaxed(relax: str | Iterable[str]) -> frozenset[str]:
    if isinstance(relax, bool) or not isinstance(relax, Iterable):
        raise SpecError(f"relax= takes the names of what to let pass, not {relax!r}", hint=f"relax='base'; all there are: {', '.join(RELAX)}")
    allowed = frozenset([relax] if isinstance(relax, str) else relax)
    if not allowed <= set(RELAX):
        wrong = sorted(map(str, allowed - set(RELAX)))
        raise SpecError(f"relax= takes {', '.join(RELAX)}, not {wrong}", hint=f"relax={closest(wrong[0], RELAX, n=1)!r}")
    return allowed


def read(folder: Path, allowed: frozenset[str]) -> tuple[TensorFile, dict[str, Any] | None, dict[str, Any] | None, list[str]]:
    """Read and check the two files on their own: tensors, our metadata (None in a foreign file), config (None if missing), notes.

    Raises:
        FormatError, FileError: see `load`.
    """
    for attempt in range(5):
        try:
            return _read(folder, allowed)
        except _Torn:
            time.sleep(0.02 * attempt)  # a save may have come between the two files
    raise FormatError(
        f"{CONFIG} and {WEIGHTS} do not belong together",
        where=str(folder),
        hint="fetch or save both again; if you edited the config: st.load(..., relax='config') goes by what was saved",
    )


class _Torn(Exception):
    """The two files are of different saves."""


def _read(folder: Path, allowed: frozenset[str]) -> tuple[TensorFile, dict[str, Any] | None, dict[str, Any] | None, list[str]]:
    notes: list[str] = []
    if folder.is_file():
        hint = f"give its folder: st.load(model, {str(folder.parent)!r})"
        raise FileError(f"{folder.name} is a file; an adapter is a folder with {' and '.join(FILES)}", where=str(folder.absolute()), hint=hint)
    if not folder.is_dir():
        fetch = f"hf download user/adapter {' '.join(FILES)} --local-dir {folder.name}"
        hint = f'a local folder, or st.load(model, "user/adapter") from the hub; by hand: {fetch}'
        raise FileError(f"there is no folder {folder}", where=str(folder.absolute()), hint=hint)
    weights, config_path = folder / WEIGHTS, folder / CONFIG
    config = None
    if _exists(config_path):
        config = parse_json(read_bytes(config_path, MAX_JSON), config_path, CONFIG)
        if not isinstance(config.get("peft_type"), str):
            raise FormatError(f"{CONFIG} does not name its peft_type", where=str(config_path), hint="it is no adapter's config, or damaged")
    if not _exists(weights):
        if _exists(folder / "adapter_model.bin"):
            where = str(folder / "adapter_model.bin")
            raise FormatError("the adapter is a pickle, which can run any code when opened", where=where, hint=f"in that folder: {CONVERT}")
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise FileError(
            f"{folder} holds no {WEIGHTS}", where=str(folder.absolute()), hint=f"adapters in folders below it: {', '.join(inside[:8]) or 'none'}"
        )
    file = read_tensors(weights)
    about = own_metadata(file)
    if about is None:
        if config is None:
            raise FileError(f"{folder} holds no {CONFIG}", where=str(folder.absolute()), hint="fetch or save it again")
        return file, None, config, notes
    if "checksum" in allowed:
        notes.append("the checksum was not looked at")
    else:
        check_sum(file)
    if type(about.get("slimtune_format")) is not int or about["slimtune_format"] != FORMAT:
        theirs = str(about.get("slimtune_format"))[:20]
        raise FormatError(f"the file is of format {theirs}, this slimtune reads {FORMAT}", where=str(weights), hint="upgrade slimtune")
    if config is None:
        notes.append(f"{CONFIG} is missing, perhaps since a save was cut off; save again so that other libraries can read the adapter, too")
    elif config_digest(config) != about.get("config"):
        if "config" not in allowed:
            raise _Torn
        notes.append(f"{CONFIG} was changed after saving; the settings in {WEIGHTS} count")
    return file, about, config, notes


def _exists(path: Path) -> bool:
    """Tell whether a file is there; one that a link leads out of its folder for is refused, but for the hub's own cache."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        if path.is_symlink():
            raise FormatError(f"{path.name} is a link to nothing", where=str(path), hint="fetch or save it again") from None
        return False
    except (OSError, RuntimeError) as error:
        raise FormatError(f"{path.name} cannot be followed: {error}", where=str(path), hint="fetch or save it again") from None
    home = Path(os.path.realpath(path.parent))
    hub = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and hub not in real.parents:
        raise FormatError(f"{path.name} is a link that leads out of its folder, to {real}", where=str(path), hint="copy the file itself here")
    return True


def _own(file: TensorFile, about: dict[str, Any]) -> tuple[Spec, list[Place], Taker, Layout]:
    """Return what our metadata says a file holds."""
    try:
        spec = Spec.from_dict(about["spec"])
    except SlimtuneError as error:
        raise FormatError(
            f"the adapter's recipe cannot be read: {error.what}",
            where=str(file.path),
            hint="import the package that registers its method, or upgrade slimtune",
        ) from None
    places = [Place(**p) for p in about["places"]]
    for p in places:
        if not all(isinstance(v, str) for v in (p.path, p.key, p.port, p.param, p.method, p.entrance)) or not isinstance(p.settings, dict):
            raise FormatError("the list of ops is malformed", where=str(file.path))
    if len({(p.path, p.key) for p in places}) != len(places) or any(p.key.startswith("slim") or not p.key for p in places):
        raise FormatError("the list of ops is malformed", where=str(file.path))
    layout = layout_of(str(about["type"]), file.path)
    names = layout.names(file) | {k.removeprefix(PREFIX): v for k, v in about["same"].items()}
    return spec, places, Taker(file, names), layout


def _trained(about: dict[str, Any] | None) -> tuple[int, int | None]:
    """Return how many optimiser steps a method that acts at them has seen, and how many there will be."""
    told = (about or {}).get("trained", {"steps": 0, "total": None})
    steps, total = told["steps"], told["total"]
    if type(steps) is not int or steps < 0 or (total is not None and (type(total) is not int or total < 1)):
        raise FormatError(f"the file tells of {str(told)[:80]} training steps")
    return steps, total


def _same_base(model: nn.Module, about: dict[str, Any], places: list[Place], folder: Path, allowed: frozenset[str]) -> list[str]:
    saved, now = Fingerprint.from_dict(about["fingerprint"]), fingerprint(model, without=_full(places))
    differences = saved.compare(now)
    if not differences:
        return []
    if "base" in allowed:
        return [f"made for another base: {d}" for d in differences[:4]]
    new = sorted({path for name in saved.moved(now) for path in fresh_modules(model) if name.startswith(f"{path}.")})
    if new and all(name.startswith(tuple(f"{path}." for path in new)) for name in saved.moved(now)):
        raise MismatchError(
            f"{', '.join(new)} of this model is random, since its checkpoint has no such weights; the adapter was trained beside other values, "
            "which its file does not hold",
            where=str(folder),
            hint="build the model under the seed of that run (torch.manual_seed before from_pretrained), load the adapter and "
            "st.merge(model, out=...) to keep the two together; or train again: train_modules='auto' puts such modules into the file",
        )
    raise MismatchError(
        f"the adapter was made for another base model: {'; '.join(differences[:6])}",
        where=str(folder),
        hint=_other_rows_hint(saved, now) + "load that base"
        + (": the weights that it acts on have other shapes here" if _reshaped(saved, now, places) else RELAX_BASE),
    )


def _reshaped(saved: Fingerprint, now: Fingerprint, places: list[Place]) -> bool:
    """Tell whether weights that the adapter acts on have other shapes here, so that no `relax` would help."""
    acted = {".".join("*" if part.isdigit() else part for part in (*place.path.split("."), place.param)) for place in places}
    return any(name in acted and name in now.structure and set(shapes) != set(now.structure[name]) for name, shapes in saved.structure.items())


def _other_rows_hint(saved: Fingerprint, now: Fingerprint) -> str:
    """Return what to do about tables of tokens where nothing but rows of theirs differs."""
    moved, tables = set(saved.moved(now)), set(saved.other_rows(now))
    if not moved or not moved <= tables:
        return ""
    names = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in tables})
    return (
        f"rows of {', '.join(names)} that were added or drawn anew are in no checkpoint: keep the base with them (model.save_pretrained), or have "
        f"the adapter's file hold them (train_modules={names!r}, or TrainableTokens for single tokens); "
    )
