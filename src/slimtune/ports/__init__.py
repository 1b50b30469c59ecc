"""The kinds of modules ops can sit on; the first that fits wins, so the most special come first."""

from __future__ import annotations

from slimtune.core.kind import Kind
from slimtune.ports.attend import AttendKind
from slimtune.ports.attention import AttentionKind
from slimtune.ports.conv import ConvKind
from slimtune.ports.embedding import EmbeddingKind
from slimtune.ports.experts import ExpertsKind, UnknownExpertsKind
from slimtune.ports.group_quantised import GroupLinearKind
from slimtune.ports.linear import Conv1DKind, LinearKind
from slimtune.ports.norm import GroupNormKind, LayerNormKind, RMSNormKind
from slimtune.ports.quantised import Linear4bitKind, Linear8bitKind
from slimtune.ports.stream import BodyKind, PromptedBlockKind

KINDS: list[Kind] = [
    Linear4bitKind(), Linear8bitKind(), GroupLinearKind(), Conv1DKind(), LinearKind(), ConvKind(1), ConvKind(2), ConvKind(3), EmbeddingKind(),
    AttentionKind(), ExpertsKind(), UnknownExpertsKind(), LayerNormKind(), GroupNormKind(), RMSNormKind(), AttendKind(), BodyKind(),
    PromptedBlockKind(),
]  # fmt: skip
