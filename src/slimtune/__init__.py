"""slimtune adapts large frozen models by training a sliver of their parameters.

    import slimtune as st
    report = st.attach(model, st.LoRA(r=16), name="support")
    ...train...
    st.save(model, "out/support", name="support")

Names are imported when they are first used: the command line answers `--help` without waiting for torch. The class of every
registered method is a name here too (st.LoRA, st.BitFit, ...), read from the registry, so a new method is one new file. Editors and type
checkers read `__init__.pyi`, which `python -m slimtune.testing.stub --write` makes of the two.
"""

from __future__ import annotations

import importlib
from typing import Any

from slimtune.version import __version__ as __version__

_HOME = {
    "slimtune.algebra.combine": ("combine", "reduce"),
    "slimtune.algebra.convert": ("convert",),
    "slimtune.algebra.extract": ("extract",),
    "slimtune.algebra.merge": ("merge", "unmerge"),
    "slimtune.core.attach": ("attach", "detach", "disabled", "keep_plan", "param_groups", "report", "trainable", "use"),
    "slimtune.core.errors": (
        "CapabilityError", "DataError", "FileError", "FormatError", "InternalsError", "InvalidName",
        "MergeError", "MismatchError", "NameInUse", "NoSuchAdapter", "PlanError", "RecipeError", "ReportError",
        "SiteError", "SlimtuneError", "SpecError", "TargetError",
    ),
    "slimtune.core.registry": ("methods", "register"),
    "slimtune.core.report": ("Report",),
    "slimtune.core.spec": ("Spec",),
    "slimtune.core.tasks": ("tasks",),
    "slimtune.core.view": ("adapters",),
    "slimtune.files.adapter": ("load", "save"),
    "slimtune.ports.group_quantised": ("quantise",),
    "slimtune.savers": ("lean", "unlean"),
    "slimtune.savers.trunk": ("cache_trunk",),
    "slimtune.train.vocabulary": ("add_tokens",),
}  # fmt: skip
_WHERE = {name: home for home, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
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
            from slimtune.core.reference_names import instead_of

            hint = instead_of(name, __dir__())
            raise AttributeError(f"module 'slimtune' has no attribute {name!r}" + (f"; here: {hint}" if hint else ""))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from slimtune.core.registry import methods as registered

    return sorted({"__version__", *_WHERE, *(cls.__name__ for cls in registered().values())})
