"""Embeddings: y = s_e W[ids], W [num, dim] canonical, s_e the constant that scaled word embeddings (Gemma, BART) multiply with, else 1.

    A [r, num]   B [dim, r]   delta = (B A)^T

The row of padding_idx stays as it is: A's column for it starts at zero and gets no gradient. Nothing else of the base may look at its rows while
it runs (`max_norm` rewrites them), nor at how gradients come back (`sparse`, `scale_grad_by_freq`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.kind import Kind
from slimtune.core.mixing import base_class
from slimtune.ports.install import install


class EmbeddingKind(Kind):
    """nn.Embedding, plain or with a constant output scale."""

    name = "embedding"
    out_axis = 1
    ports = ("weight", "output")
    params = ("weight",)
    drops = False

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding)

    def problem(self, module: Any) -> str:
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"an embedding with {option}={getattr(module, option)!r} cannot be adapted: it changes its own rows or gradients"
        if base_class(module).forward is not nn.Embedding.forward and not _scaled(module):  # type: ignore[attr-defined]
            return f"{type(module).__name__} has a forward of its own, so what a change of its weight does is not known"
        return ""

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return (module.num_embeddings, module.embedding_dim)

    def widths(self, module: Any, param: str) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def read(self, module: Any, param: str) -> Tensor:
        return module.weight  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        return install(module, weight=weight)

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return _scale(F.embedding(x, weight, host.padding_idx), host)

    def add_rows(self, x: Tensor, y: Tensor, ids: Tensor, rows: Tensor, host: Any) -> Tensor:
        at = torch.searchsorted(ids, x.to(ids.dtype)).clamp(max=len(ids) - 1)  # [n]: where each token would stand among the k
        here = (ids[at] == x)[..., None]
        return y + _scale(F.embedding(at, rows) * here, host)

    def factor_shapes(self, module: Any, param: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        num, dim = self.shape(module, param)
        return (r, num), (dim, r)

    def matrices(self, weight: Tensor, module: Any | None) -> Tensor:
        return weight.T[None]  # [1, dim, num]

    def compose(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (B @ A).T

    def down(self, x: Tensor, A: Tensor, host: Any) -> Tensor:
        return F.embedding(x, A.T, host.padding_idx)  # ids [n] -> [n, r]

    def up(self, h: Tensor, B: Tensor, host: Any) -> Tensor:
        return _scale(F.linear(h, B), host)  # [n, r] @ [r, dim] -> [n, dim]


def _scaled(module: Any) -> bool:
    """Tell whether an embedding class with its own forward is one that only multiplies with `embed_scale`: it holds nothing else."""
    inner = [name for name in module._modules if name != "slim"]
    known = "embed_scale" in module._buffers or "embed_scale" in module.__dict__
    return known and not inner and set(module._parameters) == {"weight"}


def _scale(y: Tensor, host: Any) -> Tensor:
    if not _scaled(host):
        return y
    s = host.embed_scale
    return y * (s.to(y.dtype) if isinstance(s, Tensor) else s)
