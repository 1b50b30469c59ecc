"""MAM adapter: prefix tuning in every attention and scaled parallel adapters beside every feed-forward.

Paper: arXiv 2110.04366 (section 4.6: l = 30 keys and values, bottleneck 512 at width 1024, s = 4). Cost and limits: those of
`slimtune.methods.prefix_tuning` and `slimtune.methods.parallel`. Cannot: merge.
Choose it when quality counts more than serving cost and the model will stay unmerged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slimtune.core.registry import register
from slimtune.core.spec import Spec
from slimtune.methods.parallel import Parallel
from slimtune.methods.prefix_tuning import PrefixTuning
from slimtune.methods.union import Union


def mam() -> tuple[Spec, ...]:
    return (PrefixTuning(p=30), Parallel(reduction=2, scale=4.0))


@register("mam")
@dataclass(frozen=True, kw_only=True)
class MAM(Union):
    """Mix-and-match adapter: prefix and scaled parallel adapters (arXiv 2110.04366).

    Args:
        of: the two members; default: PrefixTuning(p=30), Parallel(reduction=2, scale=4).
        targets, layers, exclude, train_modules: see `Union`.

    Example:
        >>> import slimtune as st
        >>> [part.method for part in st.MAM().parts()]
        ['prefix_tuning', 'parallel']
    """

    of: tuple[Spec, ...] = field(default_factory=mam)
