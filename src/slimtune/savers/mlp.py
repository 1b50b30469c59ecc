"""Lean feed-forwards: gated MLPs down(f(gate(x)) * up(x)) keep gate and up only; plain activations mark their output as remakeable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.kernels.gated import gated
from slimtune.kernels.lowrank import fusing
from slimtune.kernels.recipe import mark

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ACTIVATIONS = ("act_fn", "act", "activation_fn")


class LeanGatedMLP:
    """Mixin of a recognised gated MLP."""

    rank = 2
    slim_mlp: tuple[str, str, str, str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not torch.is_grad_enabled() or not fusing(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        gate, up, down, act = (getattr(self, name) for name in self.slim_mlp)
        g, u = gate(x), up(x)
        if not (g.requires_grad or u.requires_grad):
            return down(act(g) * u)
        return down(gated(g, u, act))


class LeanActivation:
    """Mixin of a parameter-free activation module: the same computation; its output can be made again from its input."""

    rank = 2

    def forward(self, x: Tensor) -> Tensor:
        plain = super().forward  # type: ignore[misc]
        y: Tensor = plain(x)
        if torch.is_grad_enabled() and y.requires_grad and fusing(x):
            mark(y, plain, x)
        return y


def recognise_gated(module: nn.Module) -> tuple[str, str, str, str] | None:
    """Return the names of (gate, up, down, activation) if `module` computes down(f(gate(x)) * up(x)) bit for bit; None otherwise."""
    act = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    for names in _NAMES:
        parts = [module._modules.get(n) for n in names]
        if act is None or any(not isinstance(p, nn.Linear) for p in parts):
            continue
        gate, up, down = parts
        weight = gate._parameters["weight"]  # type: ignore[union-attr]
        if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
            return None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, gate.in_features, generator=generator).to(device=weight.device, dtype=weight.dtype)  # type: ignore[union-attr, arg-type]
        flags = {m: m.training for m in module.modules()}
        module.eval()
        try:
            with torch.no_grad():
                same = torch.equal(down(getattr(module, act)(gate(x)) * up(x)), module(x))  # type: ignore[misc]
        except Exception:  # another calling convention: leave it alone
            return None
        finally:
            for m, training in flags.items():
                m.training = training
        return (*names, act) if same else None
    return None


def is_activation(module: nn.Module) -> bool:
    """Tell whether a module is an elementwise activation without parameters, from torch or transformers."""
    home = type(module).__module__
    if module.__dict__.get("inplace"):
        return False
    known = home == "torch.nn.modules.activation" or home == "transformers.activations"
    return known and not module._parameters and not module._modules and type(module).__name__ not in {"Softmax", "LogSoftmax", "Dropout"}
