"""Weights tied to each other, when one of them is merged: they stay tied if all are changed alike, else the model's config says that they are not.

transformers ties by configuration (`tie_word_embeddings`) and drops one of two tied weights from its files, so a config that still said "tied"
would give the untouched weight back at the next load.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtune.core.fold import Chain
from slimtune.core.placing import base_modules

Sites = list[tuple[nn.Module, str, Chain]]
FLAG = "tie_word_embeddings"


class Tied:
    """The groups of tied parameters that a merge changes, as they were before it."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        at: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in base_modules(model).values():
            for name, p in module._parameters.items():
                if p is not None:
                    at.setdefault(id(p), []).append((module, name))
        chains = {(id(module), param): chain for module, param, chain in sites}
        self.model = model
        self.alike: list[list[tuple[nn.Module, str]]] = []
        self.broken = False
        for group in at.values():
            changed = [chains.get((id(module), name)) for module, name in group]
            if len(group) < 2 or not any(changed):
                continue
            same = [None if chain is None else in_common(chain) for chain in changed]
            if None not in same and len(set(same)) == 1:
                self.alike.append(group)
            else:
                self.broken = True

    def settle(self) -> list[Any]:
        """Tie again what was changed alike, and say in the config what is tied no more; each exchange returned undoes it, and redoes it."""
        for group in self.alike:
            first = group[0][0]._parameters[group[0][1]]
            for module, name in group[1:]:
                module._parameters[name] = first
        return [Untied(self.model)] if self.broken else []


def in_common(chain: Chain) -> object | None:
    """Return what a chain does to a weight in a form that is equal for a tied one, or None if it knows none."""
    ops = [[(getattr(op, "tied", None), None if w is None else float(w)) for op, w in link] for link in chain]
    return None if any(op is None for link in ops for op, _ in link) else tuple((id(op), w) for link in ops for op, w in link)


class Untied:
    """Holds the config's word on ties that is not in force now; each call exchanges it with the one that is."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.__dict__.get("config")
        parts = [] if config is None else [config, config.get_text_config() if hasattr(config, "get_text_config") else config]
        self.aside = [(part, False) for part in {id(part): part for part in parts}.values() if hasattr(part, FLAG)]
        self()

    def __call__(self) -> None:
        now = [(part, getattr(part, FLAG)) for part, _ in self.aside]
        for part, value in self.aside:
            setattr(part, FLAG, value)
        self.aside = now
