"""Modules that the checkpoint lacked: random in this process, other values in the next, so an adapter that was trained beside them must hold them.

transformers marks each parameter that it has loaded, and not those that it has initialized. A model that was not loaded has no marks, and one
that was taken apart since then (most of it unmarked) tells nothing; then nothing counts as new.
"""

from __future__ import annotations

from torch import nn

LOADED = "_is_hf_initialized"  # on a parameter: its values came from a checkpoint
MOST = 1 / 3  # share of a model's parameters above which missing marks mean that marks got lost


def fresh_modules(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> set[str]:
    """Return the paths of modules all of whose own weights the checkpoint lacked, tables of tokens aside.

    Args:
        model: the model.
        modules: of its base, by path.
    """
    from slimtune.core.placing import base_modules, kind_at

    modules = base_modules(model) if modules is None else modules
    loaded = new = 0
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        own = [p for p in module._parameters.values() if p is not None]
        marked = [p for p in own if p.__dict__.get(LOADED)]
        loaded += sum(p.numel() for p in marked)
        new += sum(p.numel() for p in own) - sum(p.numel() for p in marked)
        if own and not marked:
            found[path] = module
    if not loaded or new > MOST * (loaded + new):
        return set()
    tables = {id(m) for m in _tables(model)}
    kinds = {path: kind_at(module) for path, module in found.items() if id(module) not in tables}
    fit = {p: kind for p, kind in kinds.items() if "weight" in kind.ports and not kind.quantised and kind.name != "embedding"}
    return {p for p, kind in fit.items() if not kind.problem(found[p])}


def _tables(model: nn.Module) -> list[nn.Module | None]:
    gets = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [get() for get in gets if callable(get)] if hasattr(model, "config") else []
