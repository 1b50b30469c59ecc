"""Weights that are not here: kept in memory or on disk by accelerate between forwards, or sharded over processes.

Between its forwards an offloaded module holds tensors on "meta"; accelerate's hook on it (`_hf_hook`) knows where the values are, and brings
them in around each forward. Whoever reads a weight outside of the forward asks for it here; inside of it nothing needs to be done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import MergeError


def device_of(module: nn.Module) -> torch.device:
    """Return the device a module computes on: that of its first parameter, or where accelerate brings it; "meta" if it has no weights at all."""
    for part in _parts(module):
        for p in part._parameters.values():
            if p is None:
                continue
            hook = _offloading(part)
            return _device(hook.execution_device) if p.is_meta and hook is not None else p.device
    return torch.device("cpu")


def offloaded(module: nn.Module) -> bool:
    """Tell whether a hook brings the weights of this very module in for each forward, and they are not here now."""
    return _offloading(module) is not None and any(p is not None and p.is_meta for p in module._parameters.values())


@contextlib.contextmanager
def at_hand(module: nn.Module, *, inside: bool = True) -> Iterator[None]:
    """Have the weights of a module, and of the modules inside it, in place within the block."""
    away = [part for part in (_parts(module) if inside else (module,)) if offloaded(part)]
    try:
        for part in away:
            part.__dict__["_hf_hook"].pre_forward(part)
        yield
    finally:
        for part in away:
            part.__dict__["_hf_hook"].post_forward(part, None)


def whole(t: Tensor) -> Tensor:
    """Return a tensor with all its shards (every process must ask for it), any other as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def identity(module: nn.Module, name: str, p: nn.Parameter) -> Any:
    """Return what two tied parameters have in common, also while they are elsewhere."""
    hook = _offloading(module) if p.is_meta else None
    if hook is None:
        return id(p)
    prefix, kept = getattr(hook.weights_map, "prefix", ""), getattr(hook.weights_map, "dataset", hook.weights_map)
    key = prefix + name
    index = getattr(kept, "index", None) or {}
    if key in index and key not in (getattr(kept, "state_dict", None) or {}):
        return str(index[key].get("safetensors_file", id(kept))), index[key].get("weight_name", key)
    t = kept[key]
    return t.device, t.data_ptr(), t.shape


def ties(model: Any) -> dict[str, str]:
    """Return tied name -> first name of a transformers model, whose ties offloading to disk cuts."""
    found = getattr(model, "all_tied_weights_keys", None)
    return dict(found) if isinstance(found, dict) else {}


def check_here(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise if one of these modules, which are to be merged or written, is filled from elsewhere at each forward.

    Raises:
        MergeError: naming the first one.
    """
    for path, module in modules:
        if _offloading(module) is not None:
            raise MergeError(
                "accelerate brings this module's weights in anew for each forward, so nothing can be merged into them",
                where=f"{path} ({type(module).__name__})",
                hint="st.save the adapter, open the base without offloading (device_map=None), st.load and merge there",
            )


def blocked(model: nn.Module, path: str) -> str:
    """Return the module above `path` whose hook brings in everything below it by name, adapters too, which it does not know; or ""."""
    at: nn.Module = model
    for name in ["", *path.split(".")]:
        at = at if not name else at._modules[name]  # type: ignore[assignment]
        hook = _offloading(at)
        if hook is not None and hook.place_submodules:
            return type(at).__name__
    return ""


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for name, child in module._modules.items():
        if child is not None and name != "slim":
            yield from _parts(child)


def _offloading(module: nn.Module) -> Any:
    """Return the hook of a module that keeps its weights elsewhere, or None."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) is True and getattr(one, "weights_map", None) is not None:
            return one
    return None


def _device(device: Any) -> torch.device:
    return torch.device("cpu") if device is None else torch.device(f"cuda:{device}" if isinstance(device, int) else device)


def is_fsdp(model: nn.Module) -> bool:
    """Tell whether a model is wrapped in FullyShardedDataParallel, which keeps a part of every tensor in every process."""
    return type(model).__name__ == "FullyShardedDataParallel"


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Have all of a FullyShardedDataParallel model's tensors whole within the block, in every process; give the model inside."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    kind = FullyShardedDataParallel
    with kind.summon_full_params(model, writeback=False):
        inner: nn.Module = model._modules["_fsdp_wrapped_module"]  # type: ignore[assignment]
        # Wrapped parts are taken for what they wrap, or no path of an adapter would be found below them.
        nested = [(m, name, part) for m in inner.modules() for name, part in m._modules.items() if isinstance(part, kind)]
        try:
            for m, name, part in nested:
                m._modules[name] = part._modules["_fsdp_wrapped_module"]
            yield inner
        finally:
            for m, name, part in nested:
                m._modules[name] = part
