"""Telling transformers' Trainer about adapters once both are there, without importing it: `import slimtune` stays light."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRAINER = "transformers.trainer"


def watch_trainers() -> None:
    """Have every transformers Trainer of this process keep adapters, now or once its module is imported."""
    module = sys.modules.get(TRAINER)
    if module is not None and hasattr(module, "Trainer"):
        _tell(module)
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(TRAINER, _tell))


def _tell(module: ModuleType) -> None:
    from slimtune.integrations.trainer import teach

    teach(module.Trainer)


class _OnImport(MetaPathFinder):
    """Calls a function with a module right after it has been imported, once."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            loader.exec_module = exec_module
        return spec
