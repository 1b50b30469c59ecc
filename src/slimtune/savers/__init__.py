"""lean(model): memory-saving, exact forms of what is frozen, found by structure and proven on the module itself before use."""

from __future__ import annotations

from slimtune.savers.lean import LeanReport, lean, unlean

__all__ = ["LeanReport", "lean", "unlean"]
