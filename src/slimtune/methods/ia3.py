"""IA3: rescale keys, values and the feed-forward's inner activation by a trained vector l, one at the start.

Paper: arXiv 2205.05638. Keys and values: y' = l * y (port output side of the layer); feed-forward: the input of its last layer, x' = l * x.
Cost: b (or a) parameters per site, about a tenth of a small LoRA's; one multiplication. Merges into weight and bias.
Choose it when there are few examples, or hundreds of tasks share one model: its files are among the smallest that merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.core.op import Op, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.targets import matches


class ScaleOutput(Op):
    """l [b]: y' = l * y, bias included."""

    roles = {"l": "gain"}
    linear_in = {"l": 1.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.l = nn.Parameter(torch.ones(site.b, device=site.device, dtype=site.dtype))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return y * self.kind.along_output(cast(self.l - 1, y), y)

    def weight(self, W: Tensor) -> Tensor:
        return W * self.kind.over_outputs(self.l.to(W.device, W.dtype), W)

    def by_rows(self) -> bool:
        return self.kind.out_axis == 0

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        return W * self.kind.over_outputs(self.l[at].to(W.device, W.dtype), W)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else b * self.l.to(b.device, b.dtype)


class ScaleInput(Op):
    """l [a]: x' = l * x."""

    roles = {"l": "gain"}
    linear_in = {"l": 1.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.l = nn.Parameter(torch.ones(site.a, device=site.device, dtype=site.dtype))

    def enter(self, x: Tensor, host: nn.Module) -> Tensor:
        return x * self.kind.along_input(cast(self.l, x), x)

    def weight(self, W: Tensor) -> Tensor:
        return W * self.kind.over_inputs(self.l.to(W.device, W.dtype), W)

    def by_rows(self) -> bool:
        return self.kind.out_axis == 0 and len(self.shape) == 2

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        return self.weight(W)


@register("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(Spec):
    """Infused adapters by inhibiting and amplifying inner activations (arXiv 2205.05638).

    Args:
        targets: layers to rescale; default: keys, values and the last layer of each feed-forward.
        feedforward: those of `targets` whose input is rescaled instead of their output.

    Example:
        >>> import slimtune as st
        >>> st.IA3().feedforward
        ('down',)
    """

    targets: str | tuple[str, ...] = ("maybe:k", "maybe:v", "maybe:qkv", "maybe:down")
    feedforward: tuple[str, ...] = ("down",)

    def _inner(self, site: Site) -> bool:
        return any(matches(p, site.path, site.module, set()) for p in self.feedforward)

    def check(self, site: Site) -> list[str]:
        if site.kind.name not in {"linear", "conv", "embedding"}:
            return [f"IA3 rescales layers, and the output of {site.kind.noun} is not one"]
        if self._inner(site) and site.kind.name not in {"linear", "conv"}:
            return [f"the input of {site.kind.noun} cannot be rescaled: take it out of feedforward="]
        return []

    def build(self, site: Site) -> Op:
        return ScaleInput(site) if self._inner(site) else ScaleOutput(site)
