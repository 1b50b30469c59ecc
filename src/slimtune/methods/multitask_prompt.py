"""Multitask prompt tuning: one prompt shared by all tasks, times a matrix of low rank for each task.

    e = P * (U_k V_k)          P [p, d] shared; U [T, p, r], V [T, r, d] of task k; * is element by element

Paper: arXiv 2303.02861, equation 1 (r = 1). At the start U_k V_k is one everywhere, so every task begins with P.
Cost: p d + T r (p + d) parameters; p more tokens in every forward. Which row is of which task says `st.tasks`.
Cannot: merge.
Choose it when several related tasks have little data each and can learn from one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.ports.prompts import PromptOp, StartedPromptSpec


class MultitaskPromptOp(PromptOp):
    """prompt [p, d], u [T, p, r], v [T, r, d]."""

    roles = {"prompt": "core", "u": "core", "v": "core"}

    def __init__(self, site: Site, start: Tensor, tasks: int, r: int, seed: int, keep: bool) -> None:
        super().__init__(site, start.shape[0], keep)
        p, d = start.shape
        new: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
        self.prompt = nn.Parameter(start)
        u, v = torch.zeros(tasks, p, r), torch.zeros(tasks, r, d)
        if not site.blank:
            # The first rank makes the ones; the others begin with one factor at zero, so that they add nothing yet and get gradients.
            u[..., 1:] = 0.02 * torch.randn(tasks, p, r - 1, generator=torch.Generator().manual_seed(seed + 1))
            u[..., 0], v[:, 0] = 1.0, 1.0
        self.u, self.v = nn.Parameter(u.to(**new)), nn.Parameter(v.to(**new))

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        num = self.u.shape[0]
        if tasks is None:
            if num > 1:
                raise PlanError(
                    f"this adapter has {num} tasks, and nobody has said which one a row is of", where=self.where, hint="st.tasks(model, [0, 2, 1])"
                )
            return self.prompt * (self.u[0] @ self.v[0])
        if not torch.compiler.is_compiling() and int(tasks.max()) >= num:
            raise PlanError(f"there is no task {int(tasks.max())}: they count from 0 to {num - 1}", where=self.where, hint="st.tasks(model, ids)")
        u, v = self.u.index_select(0, tasks), self.v.index_select(0, tasks)
        return self.prompt * (u @ v)  # [p, d] * [m, p, r] @ [m, r, d] -> [m, p, d]


@register("multitask_prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(StartedPromptSpec):
    """A shared prompt and a factor of low rank for each task (arXiv 2303.02861).

    Args:
        tasks: T, how many tasks; with more than one, `st.tasks(model, ids)` says which row is of which.
        r: rank of the factor of a task.
        targets, tokens, keep, width, seed: see `slimtune.ports.prompts.PromptSpec`.
        init, init_text, tokenizer: of the shared prompt, see `slimtune.ports.prompts.StartedPromptSpec`.

    Example:
        >>> import slimtune as st
        >>> st.MultitaskPromptTuning(tasks=3, tokens=8).r
        1
    """

    tasks: int = 1
    r: int = 1

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.tasks < 1:
            wrong.append(f"tasks must be at least 1, not {self.tasks}")
        if self.r < 1:
            wrong.append(f"r must be at least 1, not {self.r}")
        return wrong

    def prompt(self, site: Site, keep: bool) -> MultitaskPromptOp:
        return MultitaskPromptOp(site, self.start(site), self.tasks, self.r, self.seed, keep)
