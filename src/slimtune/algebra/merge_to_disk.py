"""Write a merged model as a plain checkpoint, tensor by tensor: the live model is not changed, and never held twice.

Each merged weight is computed, written and forgotten; the rest goes from the model's memory straight to the file. A quantised base is
written dequantised, in bfloat16. Weights tied to each other are written once, unless the adapter made them differ.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.algebra.merged_values import merged_sites, merged_values
from slimtune.algebra.ties import in_common
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import MergeError
from slimtune.core.fold import Chain, members
from slimtune.core.mixing import base_class
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.plan import NameLink
from slimtune.files.container import flush, plan_entries, raw_view, write_header
from slimtune.files.publish import publish

Source = Callable[[], Tensor]
SHARD_BYTES = 5 * 10**9


def merge_to_disk(model: nn.Module, links: list[NameLink], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model with `links` merged into it as model.safetensors (or shards with an index), config.json, generation_config.json.

    Args:
        model: with adapters; nothing merged at the moment.
        links: of the plan to merge; every op must be affine.
        folder: new, empty, or a checkpoint written by this function before.
        shard_bytes: largest size of one file.

    Raises:
        MergeError: the checkpoint's classes have no place for a merged value, or the folder holds other things.
        FileError: it cannot be written; what was there is untouched.
    """
    opened = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if opened and folder.exists() and Path(opened).exists() and folder.resolve() == Path(opened).resolve():
        raise MergeError("this is the folder that the base was opened from", where=str(folder), hint="name a new folder for the merged model")
    sources, quantised, untied = _sources(model, links)
    shards = _shards({name: math.prod(shape) * dtype.itemsize for name, (dtype, shape, _) in sources.items()}, shard_bytes)
    files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors": s for i, s in enumerate(shards)}
    others = [p.name for p in folder.iterdir() if not _checkpoint(p.name)] if folder.is_dir() else []
    if others:
        raise MergeError(f"{folder} holds other files: {', '.join(sorted(others)[:5])}", hint="name a new folder for the merged model")

    def write(stage: Path) -> None:
        for file, names in files.items():
            _write_shard(stage / file, {n: sources[n] for n in names})
        if len(files) > 1:
            size = sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in sources.values())
            index = {"metadata": {"total_size": size}, "weight_map": {n: f for f, names in sorted(files.items()) for n in sorted(names)}}
            (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _write_configs(model, stage, quantised, untied)

    old = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    last = "model.safetensors.index.json" if len(files) > 1 else "model.safetensors"
    publish(folder, write, last=last, alone=frozenset({*files, *old, last, "config.json", "generation_config.json"}))


def _checkpoint(name: str) -> bool:
    return name in {"config.json", "generation_config.json"} or (name.startswith("model") and name.endswith((".safetensors", ".index.json")))


def _sources(model: nn.Module, links: list[NameLink]) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], Source]], bool, bool]:
    """Return name -> (dtype, shape, function that gives the tensor) of the whole checkpoint; whether any was quantised; whether ties broke."""
    chains: dict[int, list[tuple[str, Chain]]] = {}
    for module, param, chain in merged_sites(model, links):
        chains.setdefault(id(module), []).append((param, chain))
    modules = base_modules(model)
    own = {f"{path}." if path else "": module for path, module in modules.items()}
    inside = {id(m) for module in modules.values() if id(module) in chains for m in module.modules() if m is not module}
    merged: dict[str, tuple[torch.dtype, tuple[int, ...], Source]] = {}
    same: dict[str, object] = {}
    quantised = False
    for prefix, module in own.items():
        if id(module) in inside:
            continue  # a part of a module that is merged as a whole (the output projection of nn.MultiheadAttention)
        kind = kind_at(module)
        if kind.quantised:
            quantised = True
            merged |= _dense_linear(module, prefix, chains.get(id(module), []))
        elif id(module) in chains:
            merged |= _hollowed(module, prefix, chains[id(module)])
            same |= {prefix + param: what for param, chain in chains[id(module)] if (what := in_common(chain)) is not None}
    out: dict[str, tuple[torch.dtype, tuple[int, ...], Source]] = {}
    tied: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    broken = _ties_break(model, merged, same)
    dropped = tuple(p for p, m in own.items() if kind_at(m).quantised)
    for name, t in base_state_dict(model).items():
        if not isinstance(t, Tensor) or (name.startswith(dropped) if dropped else False):
            continue
        key = (t.data_ptr(), t.shape, t.stride())
        if t.numel() and not broken and tied.setdefault(key, name) != name:
            merged.pop(name, None)  # merged under its first name
            continue
        if name in merged:
            continue
        out[name] = (t.dtype, tuple(t.shape), lambda t=t: t)  # type: ignore[misc]
    return out | merged, quantised, broken


def _ties_break(model: nn.Module, merged: dict[str, Any], same: dict[str, object]) -> bool:
    """Tell whether merging makes weights differ that share their memory: one stays as it is, or their adapters are not one and the same.

    Args:
        same: name of a merged weight -> what the ops on it have in common with those on the weights tied to it.
    """
    at: dict[int, set[str]] = {}
    for prefix, module in base_modules(model).items():
        for name, p in module._parameters.items():
            if p is not None:
                at.setdefault(id(p), set()).add(f"{prefix}.{name}" if prefix else name)
    return any(len(names) > 1 and names & set(merged) and (not names <= set(same) or len({same[n] for n in names}) > 1) for names in at.values())


def _hollowed(module: nn.Module, prefix: str, chains: list[tuple[str, Chain]]) -> dict[str, tuple[torch.dtype, tuple[int, ...], Source]]:
    """Return the sources of one merged module: it is merged on a hollow copy, once for each tensor that changes."""
    touched: set[str] = set()
    for param, chain in chains:
        touched |= _touches(module, param, chain, prefix)
    plain = {n: t for n, t in base_state_dict(module).items() if isinstance(t, Tensor)}

    def give(name: str) -> Tensor:
        copied = _hollow(module)
        kind = kind_at(module)
        for param, chain in chains:
            if name in _touches(module, param, chain, prefix):
                weight, bias = merged_values(module, param, chain)
                kind.write(copied, param, weight, bias)
        return dict(copied.named_parameters())[name].detach()

    out = {}
    for name, t in plain.items():
        out[prefix + name] = (t.dtype, tuple(t.shape), (lambda name=name: give(name)) if name in touched else (lambda t=t: t))
    return out  # type: ignore[return-value]


def _touches(module: nn.Module, param: str, chain: Chain, prefix: str) -> set[str]:
    """Return the names, below the module, of the parameters that a chain changes."""
    kind = kind_at(module)
    names = {id(p): n for n, p in module.named_parameters() if not n.startswith("slim.")}
    ops: list[Any] = [member for link in chain for op, _ in link for member in members(op)]
    found = set()
    if any(hasattr(op, "weight") for op in ops):
        read = kind.read(module, param)
        found.add(next(n for n in names.values() if module.get_parameter(n).data_ptr() == read.data_ptr()))
    if any(hasattr(op, "bias") for op in ops):
        b = kind.bias(module, param)
        if b is not None:
            found.add(next(n for n in names.values() if _holds(module.get_parameter(n), b)))
        elif any(op.bias(None) is not None for op in ops if hasattr(op, "bias")):
            _no_bias(module, prefix)
    return found


def _holds(p: Tensor, view: Tensor) -> bool:
    start = view.data_ptr() - p.data_ptr()
    return 0 <= start < p.numel() * p.element_size()


def _no_bias(module: nn.Module, prefix: str) -> None:
    raise MergeError(
        f"the adapter gives {prefix.rstrip('.')} a bias, and a plain checkpoint of this class has no place for one",
        where=f"{prefix.rstrip('.')} ({type(module).__name__})",
        hint="keep the adapter beside the base, or merge in memory: st.merge(model)",
    )


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares all tensors but holds them in tables of its own."""
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(module.__dict__)
    new.__dict__["_parameters"], new.__dict__["_buffers"] = dict(module._parameters), dict(module._buffers)
    new.__dict__["_modules"] = {k: None if m is None else _hollow(m) for k, m in module._modules.items() if k != "slim"}
    return new


def _dense_linear(module: nn.Module, prefix: str, chains: list[tuple[str, Chain]]) -> dict[str, tuple[torch.dtype, tuple[int, ...], Source]]:
    """Return the sources of a quantised linear layer, as the plain layer it stands for."""
    kind = kind_at(module)
    bias = kind.bias(module, "weight")

    def weight_now() -> Tensor:
        new = merged_values(module, *chains[0])[0] if chains else None
        return (kind.read(module, "weight") if new is None else new).to(torch.bfloat16)

    def bias_now() -> Tensor:
        new = merged_values(module, *chains[0])[1] if chains else None
        return (bias if new is None else new).to(torch.bfloat16)  # type: ignore[union-attr]

    out = {f"{prefix}weight": (torch.bfloat16, kind.shape(module, "weight"), weight_now)}
    if bias is not None:
        return out | {f"{prefix}bias": (torch.bfloat16, tuple(bias.shape), bias_now)}
    ops: list[Any] = [member for _, chain in chains for link in chain for op, _ in link for member in members(op)]
    if any(op.bias(None) is not None for op in ops if hasattr(op, "bias")):
        _no_bias(module, prefix)
    return out


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Return the names of each shard, in the order of the model."""
    shards: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if shards[-1] and total + size > limit:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards


def _write_shard(path: Path, sources: dict[str, tuple[torch.dtype, tuple[int, ...], Source]]) -> None:
    entries = plan_entries({n: (dtype, shape) for n, (dtype, shape, _) in sources.items()})
    with open(path, "wb") as f:
        write_header(f, entries, {"format": "pt"})
        for name in entries:
            dtype, shape, give = sources[name]
            t = give().to(device="cpu", dtype=dtype).contiguous()
            assert tuple(t.shape) == tuple(shape), f"{name}: {tuple(t.shape)} instead of {tuple(shape)}"
            f.write(raw_view(t))
            del t
        flush(f)


def _write_configs(model: nn.Module, stage: Path, quantised: bool, untied: bool) -> None:
    config: Any = model.__dict__.get("config")
    if config is None or not hasattr(config, "save_pretrained"):
        return  # not a transformers model: the tensors are all there is
    config = copy.deepcopy(config)
    config.architectures = [base_class(model).__name__]
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if quantised:
            part.__dict__.pop("quantization_config", None)
            part.dtype = torch.bfloat16
        if untied:
            part.tie_word_embeddings = False
    config.save_pretrained(stage)
    generation: Any = model.__dict__.get("generation_config")
    if generation is not None:
        generation.save_pretrained(stage)
