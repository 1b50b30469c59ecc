"""Parallel adapters: y' = y + s up(f(down(x))), with x the input of the sub-block that gives y.

Paper: arXiv 2110.04366 (section 4.2; "scaled parallel": s = 4 on the feed-forward, table 6). x is taken where it enters the sub-block: at the
query projection or the first layer of the feed-forward, wherever those are (see `slimtune.core.blocks`).
Cost per site of input width a, output width b and bottleneck m: m (a + b) + m + b parameters, 2 n m (a + b) FLOPs; kept for backward: x, which
the sub-block keeps anyway unless it is frozen too, and the bottleneck [n, m]. Cannot: merge (it is not affine), convert to a LoRA.
Choose it when a bottleneck adapter should see the sub-block's input: in its paper the best placement for generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from slimtune.core.blocks import sub_blocks
from slimtune.core.errors import SiteError
from slimtune.core.placing import kind_at
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.methods.bottleneck import Bottleneck, BottleneckOp


class ParallelOp(BottleneckOp):
    """down_w [m, a], down_b [m], up_w [b, m], up_b [b]."""

    reads_input = True


@register("parallel")
@dataclass(frozen=True, kw_only=True)
class Parallel(Bottleneck):
    """Bottleneck adapters beside each feed-forward, from its input (arXiv 2110.04366).

    Args:
        scale: s; 4 is the paper's "scaled parallel", 1 the plain one.
        train_scale: train s, from `scale` on.
        targets: the ends of sub-blocks: "down" (feed-forwards), "o" (attentions), or both. A module that ends none (a whole mlp, any
            layer) gets an adapter from its own input to its output. Default: "down".
        reduction, nonlinearity, norm, dropout: see `Bottleneck`.

    Raises:
        SiteError: from `attach`: a sub-block was found, but not where its input enters it.

    Example:
        >>> import slimtune as st
        >>> st.Parallel(targets=("o", "down"), scale=1.0).nonlinearity
        'relu'
    """

    op: ClassVar[type[BottleneckOp]] = ParallelOp

    scale: float = 4.0

    def sites(self, model: nn.Module) -> list[Site]:
        entrances = {block.end: block.entrance for block in sub_blocks(model)}
        found = []
        for site in super().sites(model):
            entrance = entrances.get(site.path, site.path)
            if not entrance:
                raise SiteError(
                    "where the input of this sub-block enters it is not known",
                    where=str(site),
                    hint="name a module that holds all of the sub-block (targets='self_attn'), or use st.Bottleneck, which reads the output",
                )
            if entrance != site.path:
                module = model.get_submodule(entrance)
                site = site.at_entrance(entrance, module, kind_at(module))
            found.append(site)
        return found

    def check(self, site: Site) -> list[str]:
        if site.kind.name == "embedding":
            return ["the input of an embedding is a number, not a vector"]
        return super().check(site)
