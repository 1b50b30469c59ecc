"""What a checkpoint keeps of the model: the exact tensors that are trained, never the base."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from slimtune.core.errors import FileError, FormatError
from slimtune.core.state import state_of

STATE = "state.safetensors"
PROGRESS = "progress.json"


def peak_bytes() -> int:
    """The largest resident memory this process has had, in bytes (libraries, model and all)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trained_tensors(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """Every tensor of an adapter (frozen parts and buffers too), or, without a name, every trainable weight of the model."""
    if name is None:
        return {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}
    for (path, key), op in state_of(model).adapters[name].ops.items():
        for part, tensor in [*op.named_parameters(), *op.named_buffers()]:
            found[f"{path}|{key}|{part}"] = tensor
    return found


def write_tensors(model: nn.Module, name: str | None, folder: Path) -> None:
    """Write what is trained, bit for bit."""
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in trained_tensors(model, name).items()}
    safetensors.torch.save_file(tensors, folder / STATE)


def read_tensors(model: nn.Module, name: str | None, folder: Path) -> None:
    """Put a checkpoint's tensors back.

    Raises:
        FormatError: the file is damaged.
        FileError: it belongs to another model or method.
    """
    try:
        saved = safetensors.torch.load_file(folder / STATE)
    except (OSError, safetensors.SafetensorError) as e:
        hint = "delete it and resume from the one before"
        raise FormatError(f"this checkpoint is damaged: {e}", where=str(folder), hint=hint) from e
    live = trained_tensors(model, name)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in live.items()}:
        hint = "resume with the run's own recipe"
        raise FileError("this checkpoint belongs to another model or method", where=str(folder), hint=hint)
    with torch.no_grad():
        for key, value in live.items():
            value.copy_(saved[key])


def flush(folder: Path) -> None:
    """Make sure a folder's files are on disk before it gets its final name."""
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
