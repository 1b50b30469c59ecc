"""slimtune adapts large frozen models by training a sliver of their parameters.

    import slimtune as st
    report = st.attach(model, st.LoRA(r=16), name="support")
    ...train...
    st.save(model, "out/support", name="support")

Names are imported when they are first used: the command line answers `--help` without waiting for torch. The class of every
registered method is a name here too (st.LoRA, st.BitFit, ...), read from the registry, so a new method is one new file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimtune.version import __version__

if TYPE_CHECKING:  # what editors and type checkers see
    from slimtune.algebra.combine import combine, reduce
    from slimtune.algebra.convert import convert
    from slimtune.algebra.extract import extract
    from slimtune.algebra.merge import merge, unmerge
    from slimtune.core.attach import attach, detach, disabled, keep_plan, param_groups, report, trainable, use
    from slimtune.core.errors import SlimtuneError
    from slimtune.core.registry import methods, register
    from slimtune.core.spec import Spec
    from slimtune.core.tasks import tasks
    from slimtune.files.adapter import load, save
    from slimtune.methods.bitfit import BitFit
    from slimtune.methods.bottleneck import Bottleneck
    from slimtune.methods.dense import Dense
    from slimtune.methods.lora import LoRA
    from slimtune.ports.group_quantised import quantise
    from slimtune.savers import lean, unlean
    from slimtune.savers.trunk import cache_trunk
    from slimtune.train.vocabulary import add_tokens

_HOME = {
    "slimtune.algebra.combine": ("combine", "reduce"),
    "slimtune.algebra.convert": ("convert",),
    "slimtune.algebra.extract": ("extract",),
    "slimtune.algebra.merge": ("merge", "unmerge"),
    "slimtune.core.attach": ("attach", "detach", "disabled", "keep_plan", "param_groups", "report", "trainable", "use"),
    "slimtune.core.errors": ("SlimtuneError",),
    "slimtune.core.registry": ("register",),
    "slimtune.core.spec": ("Spec",),
    "slimtune.core.tasks": ("tasks",),
    "slimtune.files.adapter": ("load", "save"),
    "slimtune.ports.group_quantised": ("quantise",),
    "slimtune.savers": ("lean", "unlean"),
    "slimtune.savers.trunk": ("cache_trunk",),
    "slimtune.train.vocabulary": ("add_tokens",),
}
_WHERE = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "BitFit",
    "Bottleneck",
    "Dense",
    "LoRA",
    "SlimtuneError",
    "Spec",
    "__version__",
    "add_tokens",
    "attach",
    "cache_trunk",
    "combine",
    "convert",
    "detach",
    "disabled",
    "extract",
    "keep_plan",
    "lean",
    "load",
    "merge",
    "methods",
    "param_groups",
    "quantise",
    "reduce",
    "register",
    "report",
    "save",
    "tasks",
    "trainable",
    "unlean",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "methods":
        return importlib.import_module("slimtune.methods")  # a callable package: st.methods() lists the registry
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    else:
        from slimtune.core.registry import methods as registered

        value = next((cls for cls in registered().values() if cls.__name__ == name), None)
        if value is None:
            raise AttributeError(f"module 'slimtune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
