"""The kinds of modules ops can sit on; the first that fits wins, so the most special come first."""

from __future__ import annotations

from slimtune.core.kind import Kind
from slimtune.ports.linear import BlockKind, Conv1DKind, LinearKind

KINDS: list[Kind] = [Conv1DKind(), LinearKind(), BlockKind()]
