"""A permanent merge: the old weights are let go one by one, and the model is a plain one afterwards.

Each weight is tried first (computed, checked, put in and taken out again), so that a merge that cannot be finished changes nothing. That is twice
the work, and no less would do: finite factors do not make a finite product, nor one that a shorter type can hold, and a weight that is gone cannot
be put back. Nothing is kept from one weight to the next: beside the model there is at most what one layer takes in the base's type, and a few rows
of it in float32; in half precision twice the layer in float32 where its rows are not made one by one (`Op.by_rows`: methods other than LoRA, DoRA,
IA3 and Dense, and LoRA on convolutions, embeddings and experts).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from slimtune.algebra.merged_values import merged_values
from slimtune.algebra.ties import Sites, Tied
from slimtune.core.placing import kind_at, uninstall
from slimtune.core.state import State
from slimtune.savers.lean import unlean


def merge_for_good(model: nn.Module, sites: Sites) -> None:
    """Replace the weights of sites by their merged values; whoever calls this has tried all of them."""
    tied = Tied(model, sites)
    for module, param, chain in sites:
        kind_at(module).write(module, param, *merged_values(module, param, chain))  # what would undo it is dropped, the old weight with it
    tied.settle()


def strip(model: nn.Module, state: State, merged: Iterable[str]) -> None:
    """Take every adapter, host and hook out of a model, and forget what unmerge would need.

    Args:
        merged: names of the adapters that are in the weights; others are gone for the model, which is said.
    """
    lost = [name for name in state.adapters if name not in set(merged)]
    state.merged, state.merged_plan = [], None
    unlean(model)
    for adapter in list(state.adapters.values()):
        uninstall(model, state, adapter)
    if lost:
        names = ", ".join(map(repr, lost))
        warnings.warn(
            f"the model is plain now: {names} sat on it too, not merged, and went with the hosts. A file of it made with st.save still fits the "
            "base that it was made for, not the merged weights",
            stacklevel=3,
        )
