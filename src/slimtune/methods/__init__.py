"""Every method is one file here; `slimtune.core.registry` finds them.

The package is callable: `slimtune.methods()` returns what is registered. (A function of that name in `slimtune` would be
overwritten by this package as soon as its first file is imported.)
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Methods(ModuleType):
    def __call__(self) -> dict[str, Any]:
        from slimtune.core.registry import methods

        return dict(methods())


sys.modules[__name__].__class__ = _Methods
