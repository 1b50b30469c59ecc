"""Prompt tuning: p trained vectors stand in front of the embedded input; nothing else changes.

    [x_1 .. x_n] -> [e_1 .. e_p, x_1 .. x_n]

Paper: arXiv 2104.08691. Cost: p d parameters, and p more tokens in every forward (attention: n p + p^2 more pairs; the cache holds them).
Cannot: merge (no weight does the same), go where no embedded tokens are read (vision, speech, diffusion).
Choose it when the model is large and must stay byte for byte as it is: a task is a few kilobytes in front of the input.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.ports.prompts import PromptOp, StartedPromptSpec


class PromptTuningOp(PromptOp):
    """prompt [p, d]."""

    roles = {"prompt": "core"}

    def __init__(self, site: Site, start: Tensor, keep: bool) -> None:
        super().__init__(site, start.shape[0], keep)
        self.prompt = nn.Parameter(start)

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return self.prompt


@register("prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class PromptTuning(StartedPromptSpec):
    """Trained virtual tokens in front of the input (arXiv 2104.08691).

    Args:
        targets, tokens, keep, width, seed: see `slimtune.ports.prompts.PromptSpec`.
        init, init_text, tokenizer: see `slimtune.ports.prompts.StartedPromptSpec`.

    Example:
        >>> import slimtune as st
        >>> st.PromptTuning(tokens=8, init="vocab").tokens
        8
    """

    def prompt(self, site: Site, keep: bool) -> PromptTuningOp:
        return PromptTuningOp(site, self.start(site), keep)
