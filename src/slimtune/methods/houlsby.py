"""Houlsby adapters: a bottleneck y' = y + s up(f(down(y))) after each attention and after each feed-forward.

Paper: arXiv 1902.00751 (section 2.1: twice in each layer, before the residual is added). The block, its cost and what it cannot do are
those of `slimtune.methods.bottleneck`, at twice as many sites. The layers' own norms stay frozen: train them too with a
union, st.Union(of=(st.Houlsby(), st.LNTuning())).
Choose it when the data are many and one adapter a block (Pfeiffer) is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.core.registry import register
from slimtune.methods.bottleneck import Bottleneck


@register("houlsby")
@dataclass(frozen=True, kw_only=True)
class Houlsby(Bottleneck):
    """Bottleneck adapters after each attention and each feed-forward (arXiv 1902.00751).

    Args:
        targets: default: "o" and "down", the ends of both kinds of sub-blocks, whichever there are. Cross-attentions count;
            exclude="encoder_attn" leaves BART's out.
        reduction, nonlinearity, norm, scale, train_scale, dropout: see `Bottleneck`.

    Example:
        >>> import slimtune as st
        >>> st.Houlsby(reduction=8).targets
        ('maybe:o', 'maybe:down')
    """

    targets: str | tuple[str, ...] = ("maybe:o", "maybe:down")
    nonlinearity: str = "gelu"
