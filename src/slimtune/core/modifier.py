"""Modifier: a spec around another spec. It goes where that one goes, with that one's modules trained in full, and builds an op that holds its op."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from slimtune.core.errors import SpecError
from slimtune.core.site import Site
from slimtune.core.spec import AUTO, Spec

PLACE = ("targets", "layers", "exclude", "train_modules")


def moved(spec: Spec, by: Spec) -> Spec:
    """Return a spec with the places that another one around it names in their stead."""
    return replace(spec, **{k: v for k in PLACE if (v := getattr(by, k)) and not (k == "train_modules" and v == AUTO)})


@dataclass(frozen=True, kw_only=True)
class Modifier(Spec):
    """Base of every spec that changes what another method does.

    Args:
        of: the method that is changed.
        targets, layers, exclude, train_modules: default: those of `of`. What is given here decides what "auto" means there.
    """

    port = "inner"

    targets: str | tuple[str, ...] | None = None  # type: ignore[assignment]
    of: Spec = field(default_factory=Spec)

    def inner(self) -> Spec:
        """Return the method inside, with this spec's places."""
        return moved(self.of, self)

    def parts(self) -> tuple[Spec, ...]:
        return (self, *self.inner().parts()[1:])

    def with_heads(self, heads: tuple[str, ...]) -> Spec:
        own = self.train_modules
        return replace(self, of=self.of.with_heads(heads if own == AUTO else ()), train_modules=() if own == AUTO else own)

    def problems(self) -> list[str]:
        from slimtune.core.stepping import acts

        try:
            self.of.validate()
        except SpecError as error:
            return [f"of ({type(self.of).__name__}): {error.what}"]
        if len({part.method for part in self.of.parts()} - {"dense"}) > 1:
            return [f"{type(self).__name__} modifies one method, and {type(self.of).__name__} is several: put it around each of them"]
        return [f"{type(self.of).__name__} acts while it trains, and {type(self).__name__} around it would hide that"] if acts(self.of) else []

    def sites(self, model: nn.Module) -> list[Site]:
        return self.inner().sites(model)

    def check(self, site: Site) -> list[str]:
        return self.inner().check(site)

    def check_all(self, sites: list[Site]) -> list[str]:
        return self.inner().check_all(sites)

    def prepare(self, sites: list[Site], shared: dict[str, Any]) -> None:
        self.inner().prepare(sites, shared)

    def wants_data(self) -> bool:
        return self.of.wants_data()

    def study(self, model: nn.Module, sites: list[Site], data: Iterable[Any], shared: dict[str, Any]) -> list[Site]:
        return self.inner().study(model, sites, data, shared)
