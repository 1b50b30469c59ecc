"""Gates: what a method contributes at a site is weighed by g = sigmoid(v . x + c), trained, one number for each token and site.

Paper: arXiv 2110.07577 (UniPELT), section 3.2: a gate for each method in each layer. The paper's gate is the mean over all tokens; here each
token has its own, so that no token sees later ones or padding, and generating step by step gives what a whole forward gives.
    y' = y + g(x) d(x, y)        a contribution (LoRA, bottleneck adapters, ...), x the input of the site
    x' = x + g(x) (e(x) - x)     a changed input (IA3 on feed-forwards)
    g [K; V], g = sigmoid(c)     keys and values of a prefix: they are made before any token is seen, so their gate is one number per layer
v and c are zero at the start: g = 1/2. Cost: a + 1 parameters per site of input width a, 2 n a FLOPs.
Cannot: merge (the gate depends on the input); modify a method that replaces the output (DoRA) or acts at training steps (AdaLoRA).
Choose it when several methods act together and each layer should learn how much of each it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.modifier import Modifier
from slimtune.core.op import Op, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.methods.lora import LoRA


class Gate(Op):
    """gate_v [a] and gate_c [1] over another op."""

    roles = {"gate_v": "gain", "gate_c": "bias"}

    def __init__(self, site: Site, inner: Op) -> None:
        super().__init__(site)
        self.inner = inner
        self.gate_v = nn.Parameter(torch.zeros(site.a, device=site.device, dtype=site.dtype))
        self.gate_c = nn.Parameter(torch.zeros(1, device=site.device, dtype=site.dtype))

    def gate(self, x: Tensor) -> Tensor:
        """Return g for each token: x [n, a] -> [n, 1]."""
        return torch.sigmoid((x * cast(self.gate_v, x)).sum(-1, keepdim=True) + cast(self.gate_c, x))

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        self.inner.resume(settings, site)


class GatedRun(Gate):
    """A gated contribution."""

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        d: Tensor = self.inner.run(x, y, host)  # type: ignore[operator]
        return self.gate(x).to(d.dtype) * d


class GatedEnter(Gate):
    """A gated change of the input."""

    def enter(self, x: Tensor, host: nn.Module) -> Tensor:
        changed: Tensor = self.inner.enter(x, host)  # type: ignore[operator]
        return x + self.gate(x) * (changed - x)


class GatedRows(Op):
    """gate_c [1] over an op that gives keys and values."""

    roles = {"gate_c": "bias"}

    def __init__(self, site: Site, inner: Op) -> None:
        super().__init__(site)
        self.inner = inner
        self.gate_c = nn.Parameter(torch.zeros(1, device=site.device, dtype=site.dtype))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values [p, heads, width] of this layer."""
        K, V = self.inner.rows()  # type: ignore[operator]
        g = torch.sigmoid(self.gate_c)
        return g * K, g * V

    settings, resume = Gate.settings, Gate.resume  # type: ignore[assignment]


@register("gated")
@dataclass(frozen=True, kw_only=True)
class Gated(Modifier):
    """A trained gate on what another method contributes (arXiv 2110.07577).

    Args:
        of: that method, such as `LoRA(r=8)`, `Bottleneck()`, `PrefixTuning()` or `IA3()`.
        targets, layers, exclude, train_modules: default: those of `of`.

    Raises:
        SpecError: from `attach`: the method replaces outputs, so there is no contribution to weigh.

    Example:
        >>> import slimtune as st
        >>> st.Gated(of=st.Bottleneck(reduction=8)).of.reduction
        8
    """

    of: Spec = field(default_factory=LoRA)

    def check(self, site: Site) -> list[str]:
        wrong = super().check(site)
        if site.port == "weight" and site.kind.name == "attention":
            wrong.append("a gate needs the output of a projection, and those inside nn.MultiheadAttention have none")
        elif site.port == "weight" and site.kind.name == "experts":
            wrong.append("a gate reads the tokens of a layer, and inside experts there are pairs of token and expert")
        elif site.port in {"weight", "output", "input"} and site.kind.name in {"embedding", "conv"}:
            wrong.append(f"a gate reads vectors, and the input of {site.kind.noun} is none")
        elif site.port == "output" and site.a <= 0:
            wrong.append(f"the width of the input of a {type(site.module).__name__} is not known")
        return wrong

    def expected_start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return what a model must give right after attaching: a gate of one half changes nothing but a prefix."""
        from slimtune.core.fold import first_tensor
        from slimtune.testing.textbook import start_of

        return start_of(self, model, inputs) if self.inner().port == "attention" else first_tensor(model(*inputs))

    def build(self, site: Site) -> Op:
        op = self.inner().build(site)
        if site.port == "attention" and hasattr(op, "rows"):
            return GatedRows(site, op)
        if hasattr(op, "run") and not hasattr(op, "turn") and not hasattr(op, "enter"):
            return GatedRun(site, op)
        if hasattr(op, "enter") and not hasattr(op, "run"):
            return GatedEnter(site, op)
        if not any(True for _ in op.parameters()):
            return op  # nothing to weigh: it only counts positions
        raise SpecError(
            f"{self.of.method} does not contribute to an output, it replaces what it finds, so a gate has nothing to weigh",
            where=str(site),
            hint="gate a method that adds: st.Gated(of=st.LoRA(r=8)), st.Gated(of=st.Bottleneck())",
        )
