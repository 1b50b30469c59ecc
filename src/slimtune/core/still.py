"""Statistics of a frozen base stay still: buffers that a training forward changes (BatchNorm's running mean and variance, vectors of a spectral
norm, codebooks of a running average) belong to the base, are in no adapter's file, and would be lost with a reload.

So as long as a model carries adapters, modules known to move their statistics (torch's batch and instance norms that track them) run in
evaluation mode, whatever `model.train()` says; that way training sees what inference will. Any other module with buffers of its own is watched in
its first training forward: if one changes, it is put back, and the module is kept still from then on, with a warning that names it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slimtune.core.mixing import generalise, specialise


class Still:
    """Mixin of a module whose statistics must not move: `train` leaves it in evaluation mode."""

    rank = 2

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]  # what is below it follows
        self.training = False
        return self


def is_still(module: nn.Module) -> bool:
    return issubclass(type(module), Still)


def tracks(module: nn.Module) -> bool:
    """Tell whether a module is known to move its statistics in training."""
    return isinstance(module, _NormBase) and module.track_running_stats and module._buffers.get("running_mean") is not None


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module's own that files of the base hold."""
    kept = {name: b for name, b in module._buffers.items() if b is not None and name not in module._non_persistent_buffers_set}
    return {name: b for name, b in kept.items() if b.is_floating_point()}


def keep_still(modules: dict[str, nn.Module]) -> None:
    """Keep what is known to move still, and watch what may.

    Args:
        modules: of the base, by path.
    """
    from slimtune.core.placing import kind_at

    for path, module in modules.items():
        if tracks(module):
            hold(module)
        elif statistics(module) and not kind_at(module).quantised:
            Watch(path).fit(module)


def hold(module: nn.Module) -> None:
    specialise(module, Still)
    module.training = False


def let_go(modules: dict[str, nn.Module], training: bool) -> None:
    """Undo `keep_still`.

    Args:
        training: the mode that the model is in.
    """
    for module in modules.values():
        for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, Watch)]:
            hook.remove(module)
        if is_still(module):
            generalise(module, Still)
            module.training = training


class Watch:
    """A hook around the first training forward of one module."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.before: dict[str, tuple[Tensor, int, Tensor]] | None = None  # buffer, its version, a copy

    def fit(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self)
        module.register_forward_hook(self)

    def remove(self, module: nn.Module) -> None:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if h is self]:
                del hooks[key]

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or not module.training:
            return
        if not output:
            self.before = {name: (b, b._version, b.detach().clone()) for name, b in statistics(module).items() if not b.is_inference()}
            return
        before, self.before = self.before or {}, None
        now = statistics(module)
        moved = [name for name, (b, version, _) in before.items() if now.get(name) is not b or b._version != version]
        moved = [name for name in moved if name in now and not torch.equal(now[name], before[name][2])]
        self.remove(module)
        if moved:
            with torch.no_grad():
                for name in moved:
                    module._buffers[name] = before[name][0]
                    before[name][0].copy_(before[name][2])
            hold(module)
            warnings.warn(
                f"{self.path or 'the model'} ({type(module).__name__}) changes its own {', '.join(moved)} in training, which no adapter's file "
                f"holds; the base is frozen, so it is put back, and this module runs in evaluation mode as long as the model carries adapters",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": None}


def note(modules: dict[str, nn.Module]) -> list[str]:
    """Return what a report says about modules that are kept still."""
    still = [path for path, module in modules.items() if is_still(module)]
    if not still:
        return []
    few = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
    kinds = ", ".join(sorted({type(modules[path]).__name__ for path in still}))
    return [f"the base's running statistics stay as they are: {len(still)} x {kinds} run in evaluation mode while adapters are attached ({few})"]
