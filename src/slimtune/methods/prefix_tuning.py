"""Prefix tuning: every attention layer sees p more keys and values, softmax(q [K; k]^T) [V; v], which are all that trains.

Paper: arXiv 2101.00190. Directly, K and V [p, heads, width] of each layer; or, for a steadier start, made by a small network
[K; V] = W2 tanh(W1 P' + b1) + b2 from one shared table P' [p, d], of which only the result is needed once training is over.
Positions: tokens come after the prefix, as in the reference's files, and the prefix itself carries no rotation.
Cost per layer: 2 p heads width parameters and 4 n p width FLOPs for each query head; no weight changes, the cache is as before.
Cannot: merge (what it adds to an attention depends on the query), start as the base itself (a new key takes its share of the softmax).
Choose it when weights must stay untouched while one batch serves many users, and prompt tuning is too weak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SiteError, TargetError
from slimtune.core.kind import Kind
from slimtune.core.mixing import base_class
from slimtune.core.op import Op
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.ports.body import is_body
from slimtune.ports.stream import StreamOp, room_problems

PARTS = ("encoder", "decoder", "cross")
CROSS = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention", "encoder_attention"}


class PrefixOp(Op):
    """K and V [p, heads, width]."""

    roles = {"K": "core", "V": "core"}

    def __init__(self, site: Site, p: int) -> None:
        super().__init__(site)
        self.p = p
        heads, wide_k, wide_v = site.kind.key_value(site.module)  # type: ignore[attr-defined]
        self.heads = heads
        self.K = nn.Parameter(torch.zeros(p, heads, wide_k, device=site.device, dtype=site.dtype))
        self.V = nn.Parameter(torch.zeros(p, heads, wide_v, device=site.device, dtype=site.dtype))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values [p, heads, width] of this layer."""
        return self.K, self.V

    def settings(self) -> dict[str, Any]:
        return {"p": self.p}


class MadePrefixOp(Op):
    """The share of one layer in the small network: P [p, d], W1 [m, d], b1 [m] are the same tensors in every layer; W2 [2 heads width, m], b2."""

    roles = {"P": "core", "W1": "down", "b1": "bias", "W2": "up", "b2": "bias"}

    def __init__(self, site: Site, common: tuple[nn.Parameter, nn.Parameter, nn.Parameter]) -> None:
        super().__init__(site)
        self.P, self.W1, self.b1 = common
        self.p = self.P.shape[0]
        self.heads, self.wide_k, self.wide_v = site.kind.key_value(site.module)  # type: ignore[attr-defined]
        b = self.heads * (self.wide_k + self.wide_v)
        self.W2 = nn.Parameter(torch.zeros(b, self.W1.shape[0], device=site.device, dtype=site.dtype))
        self.b2 = nn.Parameter(torch.zeros(b, device=site.device, dtype=site.dtype))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values [p, heads, width] of this layer."""
        h = torch.tanh(torch.nn.functional.linear(self.P, self.W1, self.b1))  # [p, d] -> [p, m]
        made = torch.nn.functional.linear(h, self.W2, self.b2)  # [p, m] -> [p, heads (width + width)]
        k, v = made.split([self.heads * self.wide_k, self.heads * self.wide_v], 1)
        return k.view(self.p, self.heads, -1), v.view(self.p, self.heads, -1)

    def settings(self) -> dict[str, Any]:
        return {"p": self.p, "hidden": self.W1.shape[0], "width": self.P.shape[1]}


class PositionOp(StreamOp):
    """On the body around the layers: its tokens count their positions from p on. Nothing to train."""

    def __init__(self, site: Site, p: int) -> None:
        super().__init__(site)
        self.shift = p

    def settings(self) -> dict[str, Any]:
        return {"shift": self.shift}


@register("prefix_tuning")
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Spec):
    """Keys and values in front of every attention layer's own (arXiv 2101.00190).

    Args:
        p: how many, in each layer.
        hidden: units of the network that makes them while training; 0: they are trained directly.
        std: of the random numbers that they, or the table of the network, start from. Starting large, they want a high learning rate (3e-2).
        seed: of those numbers.
        where: of an encoder-decoder: which of "encoder", "decoder" (both: attention to their own tokens) and "cross" (to the encoder's).
        targets: attention layers; "attention" means all.

    Example:
        >>> import slimtune as st
        >>> st.PrefixTuning(p=10, layers="last:4").p
        10
    """

    port = "attention"

    targets: str | tuple[str, ...] = "attention"
    p: int = 20
    hidden: int = 0
    std: float = 1.0
    seed: int = 0
    where: tuple[str, ...] = PARTS

    def problems(self) -> list[str]:
        wrong = [] if self.p >= 1 else [f"p must be at least 1, not {self.p}"]
        if self.hidden < 0:
            wrong.append(f"hidden must be at least 0, not {self.hidden}")
        if self.std <= 0:
            wrong.append(f"std must be positive, not {self.std}")
        if not self.where or not set(self.where) <= set(PARTS):
            wrong.append(f"where takes some of {', '.join(PARTS)}, not {self.where!r}")
        return wrong

    def check(self, site: Site) -> list[str]:
        if site.port == "stream":
            return room_problems(site, self.p)
        heads, wide_k, _ = site.kind.key_value(site.module)  # type: ignore[attr-defined]
        return [] if heads and wide_k else ["this attention layer does not tell how many heads its keys have, and how wide"]

    def sites(self, model: nn.Module) -> list[Site]:
        if self.targets == "attention":
            refuse_own_attention(model)
        found = super().sites(model)
        if two_stacks(model):
            chosen = [site for site in found if part_of(model, site) in self.where]
            if not chosen:
                raise SiteError(f"none of the {len(found)} attention layers belongs to where={self.where!r}", hint=f"some of {', '.join(PARTS)}")
            found = chosen
        return found + moved(model, found)

    def build(self, site: Site) -> Op:
        if site.port == "stream":
            return PositionOp(site, self.p)
        if not self.hidden:
            op = PrefixOp(site, self.p)
            if not site.blank:
                for t in (op.K, op.V):
                    fill(t, self.std, self._draws(site))
            return op
        heads, wide_k, _ = site.kind.key_value(site.module)  # type: ignore[attr-defined]
        if "prefix network" not in site.shared:
            d = heads * wide_k
            shapes: tuple[tuple[int, ...], ...] = ((self.p, d), (self.hidden, d), (self.hidden,))
            P, W1, b1 = (nn.Parameter(torch.zeros(s, device=site.device, dtype=site.dtype)) for s in shapes)
            if not site.blank:
                fill(P, self.std, self._draws(site))
                fill(W1, 1 / math.sqrt(d), self._draws(site))
            site.shared["prefix network"] = (P, W1, b1)
        made = MadePrefixOp(site, site.shared["prefix network"])
        if not site.blank:
            fill(made.W2, 1 / math.sqrt(self.hidden), self._draws(site))
        return made

    def expected_start(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return what a model must give right after `attach`: no prefix, whatever its values, leaves an attention as it was."""
        from slimtune.testing.textbook import start_of

        return start_of(self, model, inputs)

    def _draws(self, site: Site) -> torch.Generator:
        """Return the adapter's own source of random numbers."""
        generator: torch.Generator = site.shared.setdefault("prefix numbers", torch.Generator().manual_seed(self.seed))
        return generator


def fill(t: Tensor, std: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        t.copy_(torch.randn(t.shape, generator=generator) * std)


def two_stacks(model: nn.Module) -> bool:
    """Tell whether a model is an encoder-decoder."""
    config = model.__dict__.get("config")
    return config is not None and bool(getattr(config, "is_encoder_decoder", False))


def moved(model: nn.Module, layers: list[Site]) -> list[Site]:
    """Return a site on each body whose tokens have positions and attend to themselves in one of these layers: they come after the prefix."""
    from slimtune.core.placing import base_modules, kind_at

    own = {id(site.module) for site in layers if not crosses(site)}
    found: dict[str, tuple[nn.Module, Kind]] = {}
    for path, module in base_modules(model).items():
        kind = kind_at(module)
        if is_body(module) and "stream" in kind.ports and any(id(m) in own for m in module.modules()):
            found = {p: f for p, f in found.items() if p and not path.startswith(f"{p}.")}  # the innermost bodies
            found[path] = (module, kind)
    return [Site(path=p, port="stream", kind=k, module=m) for p, (m, k) in found.items() if k.study(m).positions]


def crosses(site: Site) -> bool:
    """Tell whether an attention layer attends to the tokens of another stack."""
    return bool(CROSS & set(site.path.split("."))) or "CrossAttention" in base_class(site.module).__name__


def part_of(model: nn.Module, site: Site) -> str:
    """Return which part of an encoder-decoder an attention layer belongs to."""
    if crosses(site):
        return "cross"
    encoder = model.get_encoder()  # type: ignore[operator]
    return "encoder" if any(m is site.module for m in encoder.modules()) else "decoder"


def refuse_own_attention(model: nn.Module) -> None:
    """Raise for a model none of whose attention layers asks transformers' registry.

    Raises:
        SiteError: naming its class of attention.
        TargetError: there is none.
    """
    from slimtune.core.placing import base_modules, kind_at
    from slimtune.core.targets import role_of

    modules = base_modules(model)
    if any("attention" in kind_at(m).ports for m in modules.values()):
        return
    for path in modules:
        if role_of(path) in {"q", "qkv"} and "." in path:
            above = path.rpartition(".")[0]
            raise SiteError(
                f"{type(modules[above]).__name__} computes attention in code of its own, not through transformers' registry, so there is no place "
                "for more keys and values",
                where=f"{above} in {type(model).__name__}",
                hint="st.LoRA() adapts the projections inside it, and st.PromptTuning() goes in front of the whole model",
            )
    raise TargetError(
        f"this {type(model).__name__} has no attention layer", where=type(model).__name__, hint="st.LoRA() goes onto any linear layer"
    )


