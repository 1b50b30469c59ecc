"""What a checkpoint keeps of the model: the exact tensors that are trained, never the base."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from slimtune.core.errors import FileError, FormatError, SlimtuneError
from slimtune.core.state import state_of
from slimtune.core.trained import Trained

STATE = "state.safetensors"
PROGRESS = "progress.json"
ABOUT = "slimtune"  # its entry in the header of STATE


def peak_bytes() -> int:
    """The largest resident memory this process has had, in bytes (libraries, model and all)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trained_tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """Every tensor of an adapter (frozen parts and buffers too), or, without a name, every trainable weight of the model."""
    return trained_state(model, name)[0]


def trained_state(model: nn.Module, name: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same with what else training goes on from: the optimiser steps that the method has seen, and facts of its ops (JSON values)."""
    if name is None:
        return {n: p for n, p in model.named_parameters() if p.requires_grad}, {}
    adapter = state_of(model).adapters[name]
    found: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for (path, key), op in adapter.ops.items():
        if isinstance(op, Trained):
            tensors, facts[f"{path}|{key}"] = op.training_state()
        else:
            tensors = {**dict(op.named_parameters()), **dict(op.named_buffers())}
        found |= {f"{path}|{key}|{part}": tensor for part, tensor in tensors.items()}
    return found, {"steps": adapter.steps, "total_steps": adapter.total_steps, "facts": facts}


def write_tensors(model: nn.Module, name: str | None, folder: Path) -> None:
    """Write what is trained, bit for bit."""
    found, about = trained_state(model, name)
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in found.items()}
    safetensors.torch.save_file(tensors, folder / STATE, {ABOUT: json.dumps(about, sort_keys=True)})


def read_tensors(model: nn.Module, name: str | None, folder: Path, hint: str = "resume with the run's own recipe") -> None:
    """Put a checkpoint's tensors back.

    Args:
        hint: what to do where it belongs to another model or method.

    Raises:
        FormatError: the file is damaged.
        FileError: it belongs to another model or method.
    """
    try:
        saved = safetensors.torch.load_file(folder / STATE)
        with safetensors.safe_open(folder / STATE, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get(ABOUT, "{}"))
    except (OSError, safetensors.SafetensorError, ValueError) as e:
        before = "delete it and resume from the one before"
        raise FormatError(f"this checkpoint is damaged: {e}", where=str(folder), hint=before) from e
    unlike = _unlike(saved, trained_tensors(model, name))
    other = FileError(f"this checkpoint belongs to another model or method{unlike}", where=str(folder), hint=hint)
    if name is not None:
        adapter = state_of(model).adapters[name]
        facts = about.get("facts", {})
        if set(facts) != {f"{path}|{key}" for (path, key), op in adapter.ops.items() if isinstance(op, Trained)}:
            raise other
        for (path, key), op in adapter.ops.items():
            if isinstance(op, Trained):
                head = f"{path}|{key}|"
                mine = {k.removeprefix(head): saved[k] for k in saved if k.startswith(head)}
                try:
                    op.restore_training(mine, facts[head[:-1]])
                except (KeyError, ValueError, TypeError) as e:
                    raise other from e
        adapter.steps, adapter.total_steps = about.get("steps", 0), about.get("total_steps")
    live = trained_tensors(model, name)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in live.items()}:
        raise other
    with torch.no_grad():
        for key, value in live.items():
            value.copy_(saved[key])


def _unlike(saved: dict[str, Tensor], live: dict[str, Tensor]) -> str:
    """Return the first of the tensors that have other shapes here, or are on one side only, in words; "" if all are alike."""
    both = [k for k in live if k in saved and saved[k].shape != live[k].shape]
    odd = [f"{k} is {list(saved[k].shape)} there, {list(live[k].shape)} here" for k in both]
    odd += [f"it has no {k}" for k in live if k not in saved] + [f"here is no {k}" for k in saved if k not in live]
    return f": {odd[0].replace('||', '.').replace('|', '.')}" + (f" (and {len(odd) - 1} more)" if len(odd) > 1 else "") if odd else ""


@contextlib.contextmanager
def intact(checkpoint: str | None) -> Iterator[None]:
    """Turn whatever reading a checkpoint's files raises into one sentence; torch's own would advise to open them unsafely.

    Raises:
        FormatError: naming the checkpoint.
    """
    try:
        yield
    except (SlimtuneError, MemoryError):
        raise
    except Exception as e:
        hint = "delete this checkpoint and resume from the one before"
        raise FormatError(f"this checkpoint is damaged ({type(e).__name__})", where=str(checkpoint), hint=hint) from None


def flush(folder: Path) -> None:
    """Make sure a folder's files are on disk before it gets its final name."""
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
