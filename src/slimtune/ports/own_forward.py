"""Linear layers with a forward of their own: is it still y = x W^T + bias?

Subclasses of nn.Linear are free to normalise, quantise or route first, or to return tuples; then what a change of the weight does is not known. A
list of names would always be behind, so an unknown forward is asked: a copy of the layer with random weights is run on random rows, in eval and in
training mode, and compared with the plain product.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.mixing import base_class

ROWS = 4
CLOSE = 1e-5  # relative error of two float32 products over some thousand inputs stays far below it
_PLAIN = (bool, int, float, str, type(None))
_KNOWN: weakref.WeakKeyDictionary[type, dict[Any, str]] = weakref.WeakKeyDictionary()


def own_forward_problem(module: Any) -> str:
    """Return why the forward of a subclass of nn.Linear is not its plain product, or an empty string.

    Args:
        module: with a weight of real numbers; nothing of it is changed or read but the shapes.
    """
    cls = base_class(module)
    if cls.forward is nn.Linear.forward:  # type: ignore[attr-defined]
        return ""
    own = {k: v for k, v in module.__dict__.items() if isinstance(v, _PLAIN) and k != "training"}
    key = repr(sorted(own.items(), key=lambda item: item[0]))
    found = _KNOWN.setdefault(cls, {})
    if key not in found:
        differs = _differs(module, cls)
        found[key] = differs and f"{cls.__name__} has a forward of its own, {differs}, so what a change of its weight does is not known"
    return found[key]


def _differs(module: Any, cls: type) -> str:
    if any(b is not None and b.is_meta for b in module._buffers.values()) or not isinstance(module._parameters.get("weight"), Tensor):
        return ""  # what it computes cannot be seen here; the model is opened for real before it runs
    rng = torch.Generator().manual_seed(0)
    twin = _twin(module, cls, rng)
    weight, bias = twin._parameters["weight"], twin._parameters.get("bias")
    x = torch.randn(ROWS, module.in_features, generator=rng).to(weight)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad():
        expected = F.linear(x, weight, bias) if weight.shape[-1] == x.shape[-1] else None
        for training in (False, True):
            twin.train(training)
            try:
                y, again = twin(x), twin(x)
            except Exception as error:  # whatever a foreign forward raises
                return f"which does not take rows [n, {module.in_features}] ({type(error).__name__})"
            if not isinstance(y, Tensor):
                return f"which returns a {type(y).__name__}"
            if training and not torch.equal(y, again):
                continue  # dropout: eval has told
            if expected is None or y.shape != expected.shape or not (y - expected).norm() <= CLOSE * expected.norm():
                return "which is not the product with its weight" + (" while it trains" if training else "")
    return ""


def _twin(module: Any, cls: Any, rng: torch.Generator) -> Any:
    """Return a copy with random parameters, so that nothing the forward does reaches the module, and a weight of zeros hides nothing."""
    twin = cls.__new__(cls)
    held = dict(module.__dict__)
    held["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.randn(p.shape, generator=rng).to(_device(p), _wide(p)), requires_grad=False)
        for name, p in module._parameters.items()
    }
    held["_buffers"] = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
    held["_modules"] = {k: copy.deepcopy(m) for k, m in module._modules.items() if k != "slim"}
    for name in held:
        if name.endswith("_hooks"):
            held[name] = type(held[name])()
    for name in ("forward", "slim_own", "_old_forward"):
        held.pop(name, None)
    twin.__dict__.update(held)
    return twin


def _device(p: Tensor) -> torch.device:
    return torch.device("cpu") if p.is_meta else p.device


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
