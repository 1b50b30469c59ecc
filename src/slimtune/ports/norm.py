"""Norms: y = x^ g (+ bias), x^ the normalised input, g [d] the gain. A delta of the gain adds x^ dg to the output, a delta of the bias itself.

nn.LayerNorm and nn.GroupNorm have both; RMS norms (torch's, and every transformers class of that name) take no bias. A gain is no matrix, so
low-rank methods are refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.errors import SiteError
from slimtune.core.kind import Kind
from slimtune.ports.install import install

EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


class NormKind(Kind):
    """What all norms share."""

    name = "norm"
    ports = ("weight", "output")
    params = ("weight",)

    def names(self, module: Any) -> tuple[str, ...]:
        return ("weight",) if module._parameters.get("weight") is not None else ()

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return tuple(module.weight.shape)

    def widths(self, module: Any, param: str) -> tuple[int, int]:
        weight = module._parameters.get("weight")
        d = weight.shape[-1] if weight is not None else self.channels(module)
        return d, d

    def channels(self, module: Any) -> int:
        """Return the width of a norm without a gain."""
        return module.normalized_shape[-1]  # type: ignore[no-any-return]

    def read(self, module: Any, param: str) -> Tensor:
        return module.weight  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        return install(module, weight=weight, bias=bias)

    def rank_problems(self, module: Any, param: str, r: int) -> list[str]:
        return [f"a norm's gain {list(self.shape(module, param))} is no matrix, so it has no low-rank delta: use st.BitFit or st.Dense on it"]

    def factor_shapes(self, module: Any, param: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise SiteError(self.rank_problems(module, param, r)[0])


class LayerNormKind(NormKind):
    """nn.LayerNorm."""

    takes_bias = True

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.LayerNorm)

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return F.layer_norm(x, host.normalized_shape, weight.to(x.dtype), None, host.eps)


class GroupNormKind(NormKind):
    """nn.GroupNorm: the channels are the second dimension."""

    takes_bias = True
    channels_last = False

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.GroupNorm)

    def channels(self, module: Any) -> int:
        return module.num_channels  # type: ignore[no-any-return]

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return F.group_norm(x, host.num_groups, weight.to(x.dtype), None, host.eps)

    def along_output(self, v: Tensor, y: Tensor) -> Tensor:
        return v.view(-1, *[1] * (y.dim() - 2))


class RMSNormKind(NormKind):
    """RMS norms: one parameter `weight` [d], an epsilon, no parts, a class name that ends with RMSNorm."""

    def fits(self, module: Any) -> bool:
        if isinstance(module, nn.RMSNorm):
            return True
        if not type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) or any(name != "slim" for name in module._modules):
            return False
        weight = module._parameters.get("weight")
        return set(module._parameters) == {"weight"} and weight is not None and weight.dim() == 1 and _eps(module) is not None

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        eps = _eps(host)
        if eps is None:  # torch's own may leave it to the data type
            eps = torch.finfo(x.dtype).eps
        dims = tuple(range(-weight.dim(), 0))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
        return (normed * weight).to(x.dtype)


def _eps(module: Any) -> float | None:
    return next((module.__dict__[key] for key in EPS if key in module.__dict__), None)
