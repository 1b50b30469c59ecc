"""UniPELT: LoRA on queries and values, a prefix in every attention, an adapter after every feed-forward, each with a trained gate.

Paper: arXiv 2110.07577 (section 3.2, and 4.1 for sizes: rank 8, prefix of 10, bottleneck 48 at width 768). What the gates read, and how they
differ from the paper's, stands in `slimtune.methods.gated`. Cost: the sum of the three and a + 1 parameters for each gate. Cannot: merge.
Choose it when you cannot tell which of LoRA, prefix and adapter suits the task: gates find out layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slimtune.core.registry import register
from slimtune.core.spec import Spec
from slimtune.methods.bottleneck import Bottleneck
from slimtune.methods.gated import Gated
from slimtune.methods.lora import LoRA
from slimtune.methods.prefix_tuning import PrefixTuning
from slimtune.methods.union import Union


def unipelt() -> tuple[Spec, ...]:
    queries_and_values = ("maybe:q", "maybe:v", "maybe:qkv")
    return (
        Gated(of=LoRA(r=8, alpha=16, targets=queries_and_values)),
        Gated(of=PrefixTuning(p=10)),
        Gated(of=Bottleneck(reduction=16)),
    )


@register("unipelt")
@dataclass(frozen=True, kw_only=True)
class UniPELT(Union):
    """Gated LoRA, prefix and bottleneck adapter in one (arXiv 2110.07577).

    Args:
        of: the members; default: gated LoRA(r=8) on queries and values, PrefixTuning(p=10) and Bottleneck(reduction=16).
        targets, layers, exclude, train_modules: see `Union`.

    Example:
        >>> import slimtune as st
        >>> [part.of.method for part in st.UniPELT().parts()]
        ['lora', 'prefix_tuning', 'bottleneck']
    """

    of: tuple[Spec, ...] = field(default_factory=unipelt)
