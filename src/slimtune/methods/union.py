"""Union: several methods under one name, trained, saved, used and merged as one adapter. Within a site they act in the order of the members.

Each member keeps its own places and options; places given to the union itself are those of every member. Cost: the sum of the members'.
Cannot: what one of its members cannot; it merges only if all of them do.
Choose it when two methods complete each other and should be trained, saved and switched as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.modifier import moved
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import AUTO, Spec
from slimtune.methods.bottleneck import Bottleneck
from slimtune.methods.dense import Dense
from slimtune.methods.lora import LoRA


def usual() -> tuple[Spec, ...]:
    return (LoRA(), Bottleneck())


@register("union")
@dataclass(frozen=True, kw_only=True)
class Union(Spec):
    """Several methods as one adapter.

    Args:
        of: the members; each is a spec of its own, a union too.
        targets, layers, exclude: instead of those of the members; default: each keeps its own.
        train_modules: trained in full beside the members, and beside what they name themselves; it decides what their "auto" means.

    Example:
        >>> import slimtune as st
        >>> [part.method for part in st.Union(of=(st.LoRA(r=4), st.IA3())).parts()]
        ['lora', 'ia3']
    """

    port = "several"

    targets: str | tuple[str, ...] | None = None  # type: ignore[assignment]
    of: tuple[Spec, ...] = field(default_factory=usual)

    def parts(self) -> tuple[Spec, ...]:
        found: list[Spec] = []
        places = replace(self, train_modules=())
        beside = () if self.train_modules == AUTO else self.train_modules
        members = [part for spec in self.of for part in moved(spec, places).parts()]
        for part in [*members, *([Dense(targets=beside)] if beside else [])]:
            if not (isinstance(part, Dense) and part in found):  # one head, whoever names it
                found.append(part)
        return tuple(found)

    def with_heads(self, heads: tuple[str, ...]) -> Spec:
        own = self.train_modules
        members = tuple(spec.with_heads(heads if own == AUTO else ()) for spec in self.of)
        return replace(self, of=members, train_modules=() if own == AUTO else own)

    def problems(self) -> list[str]:
        wrong = [] if self.of else ["of= is empty: a union has at least one member"]
        for i, spec in enumerate(self.of):
            try:
                spec.validate()
            except SpecError as error:
                wrong.append(f"of[{i}] ({type(spec).__name__}): {error.what}")
        return wrong

    def sites(self, model: nn.Module) -> list[Site]:
        return [site for part in self.parts() for site in part.sites(model)]

    def expected_start(self, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Return what a model must give right after attaching: what the one member gives that does not start as the base itself."""
        from slimtune.core.fold import first_tensor

        base = first_tensor(model(*inputs))
        starts: list[Tensor] = [p.expected_start(model, inputs) for p in self.parts() if hasattr(p, "expected_start")]
        return next((start for start in starts if not torch.equal(start, base)), base)
