"""LayerNorm tuning: only the gains (and biases) of the norms train, as deltas that start at zero.

Paper: arXiv 2312.11420. Works on LayerNorm, GroupNorm and RMSNorm. Cost: one or two numbers per channel and norm; merges.
Choose it when a few thousand numbers must do, for instance to lead a language model to another kind of input.
"""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.methods.dense import DenseOp


@register("ln_tuning")
@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(Spec):
    """Train the norms (arXiv 2312.11420).

    Args:
        targets: default: every norm.

    Example:
        >>> import slimtune as st
        >>> st.LayerNormTuning(layers="last:4").targets
        'norm'
    """

    targets: str | tuple[str, ...] = "norm"

    def check(self, site: Site) -> list[str]:
        return [] if site.kind.name == "norm" else [f"{site.kind.noun} is no norm: use Dense to train it"]

    def build(self, site: Site) -> DenseOp:
        return DenseOp(site)
