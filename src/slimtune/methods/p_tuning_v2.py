"""P-tuning v2: prefix tuning set up for understanding tasks: keys and values in every layer, and the classification head trained with them.

Paper: arXiv 2110.07602. The op is that of prefix tuning (softmax(q [K; k]^T) [V; v], K and V [p, heads, width] of each layer); what differs is
the preset: every layer of encoders and decoders alike, long prompts (the paper takes 20 to 100), a head for sequences or tokens in
place of words that stand for classes, and the network that makes the prompts only where it is asked for.
Cost: as prefix tuning, plus the head's own parameters. Cannot: merge, start as the base itself.
Choose it when a frozen encoder or decoder must classify or tag, and its weights must not be touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from slimtune.core.placing import base_modules, kind_at
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.targets import find_sites, heads
from slimtune.methods.dense import Dense
from slimtune.methods.prefix_tuning import PrefixTuning

TASK_HEAD = "task-head"


@dataclass(frozen=True, kw_only=True)
class TaskHead(Dense):
    """Full training of what turns hidden states into classes, where a model has that; its output embedding is none."""

    optional: ClassVar[bool] = True

    def sites(self, model: nn.Module) -> list[Site]:
        get = getattr(model, "get_output_embeddings", None)
        words, modules = get() if callable(get) else None, base_modules(model)
        mine = [p for p in heads(model) if p in modules and modules[p] is not words and kind_at(modules[p]).names(modules[p])]
        return find_sites(model, Dense(targets=tuple(sorted(mine))), "weight") if mine else []


@register("p_tuning_v2")
@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompts and a trained head, for classifying sequences and tokens (arXiv 2110.07602).

    Args:
        p, std, seed, where, targets: as in `PrefixTuning`.
        hidden: units of the network that makes them while training; 0: they are trained directly, which the paper finds as good on many tasks.
        train_modules: what is trained in full beside them; "task-head", of older files: what stands beside the body of any model.

    Example:
        >>> import slimtune as st
        >>> st.PTuningV2(p=40).train_modules
        'auto'
    """

    def parts(self) -> tuple[Spec, ...]:
        return (self, TaskHead()) if self.train_modules == TASK_HEAD else super().parts()
