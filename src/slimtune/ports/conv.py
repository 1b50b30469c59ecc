"""Convolutions nn.Conv1d / Conv2d / Conv3d: groups, stride, dilation, every padding mode, batched and unbatched input.

A low-rank delta is a convolution down to r channels with the layer's own geometry, then one of size 1 up to b channels:

    A [r, a/g, *k]   B [b, r/g, 1, ...]   delta[o] = sum_j B[o, j] A[group of o, j]   in canonical shape [b, a/g, *k]

With g groups each has r/g of the r directions, so the delta is itself a grouped convolution and merges. The reference library instead lets A
see all a inputs ("wide", [r, a, *k]), which no grouped weight equals: such factors are run as they are, and refuse to merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from slimtune.core.errors import CapabilityError
from slimtune.core.kind import Kind
from slimtune.core.mixing import base_class
from slimtune.core.plan import Plan
from slimtune.ports.install import install

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


class ConvKind(Kind):
    """nn.ConvNd with n spatial dimensions.

    Args:
        n: 1, 2 or 3.
    """

    name = "conv"
    ports = ("weight", "output")
    params = ("weight",)
    takes_bias = True
    channels_last = False

    def __init__(self, n: int) -> None:
        self.n = n

    def fits(self, module: Any) -> bool:
        return isinstance(module, CONVS[self.n - 1])

    def problem(self, module: Any) -> str:
        if isinstance(module._parameters.get("weight"), UninitializedParameter):
            return "the weight of this lazy convolution does not exist yet: call the model once before"
        if base_class(module).forward is not CONVS[self.n - 1].forward:  # type: ignore[attr-defined]
            return f"{type(module).__name__} has a forward of its own, so what a change of its weight does is not known"
        return ""

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)

    def widths(self, module: Any, param: str) -> tuple[int, int]:
        return module.in_channels, module.out_channels

    def read(self, module: Any, param: str) -> Tensor:
        return module.weight  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        return install(module, weight=weight, bias=bias)

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return self._convolve(x, weight.to(x.dtype), host, host.groups)

    def _convolve(self, x: Tensor, kernel: Tensor, host: Any, groups: int) -> Tensor:
        padding = host.padding
        if host.padding_mode != "zeros":
            x = F.pad(x, host._reversed_padding_repeated_twice, mode=host.padding_mode)
            padding = 0
        return PRODUCTS[self.n - 1](x, kernel, None, host.stride, padding, host.dilation, groups)

    def along_output(self, v: Tensor, y: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.n)  # [b] -> [b, 1, ...], which fits batched and unbatched outputs

    def along_input(self, v: Tensor, x: Tensor) -> Tensor:
        return v.view(-1, *[1] * self.n)

    def over_inputs(self, v: Tensor, weight: Tensor) -> Tensor:
        c = weight.shape[1]  # a/g: group g of the outputs sees its own part of v
        return v.view(-1, 1, c).expand(-1, weight.shape[0] * c // v.shape[0], c).reshape(*weight.shape[:2], *[1] * self.n)

    # ---- low rank -----------------------------------------------------------------------------------------------
    def factor_shapes(self, module: Any, param: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        b, *rest = self.shape(module, param)
        return (r, *rest), (b, self.inner_rank(module, r), *[1] * self.n)

    def layouts(self, module: Any, param: str, r: int) -> list[tuple[int, ...]]:
        wide = (r, module.in_channels, *module.kernel_size)
        return list(dict.fromkeys([self.factor_shapes(module, param, r)[0], wide]))

    def adopt(self, A: Tensor, B: Tensor) -> Tensor:
        small = self.narrow(A, A.shape[0] // B.shape[1])
        return A if small is None else small

    def widen(self, A: Tensor, groups: int) -> Tensor:
        """Return A [r, a/g, *k] in the wide layout [r, a, *k]: zero outside its own group, so the map is the same."""
        q, c = A.shape[0] // groups, A.shape[1]
        out = A.new_zeros(A.shape[0], c * groups, *A.shape[2:])
        for g in range(groups):
            out[g * q : (g + 1) * q, g * c : (g + 1) * c] = A[g * q : (g + 1) * q]
        return out

    def narrow(self, A: Tensor, groups: int) -> Tensor | None:
        """Return a wide A in the grouped layout, or None if it reads inputs of other groups."""
        q, c = A.shape[0] // groups, A.shape[1] // groups
        parts = [A[g * q : (g + 1) * q, g * c : (g + 1) * c] for g in range(groups)]
        small = torch.cat(parts, 0)
        return small if torch.equal(self.widen(small, groups), A) else None

    def rank_problems(self, module: Any, param: str, r: int) -> list[str]:
        groups: int = module.groups
        if r % groups:
            return [f"the rank must be a multiple of the {groups} groups, not {r}: set it with rank_pattern=, or leave the layer out with exclude="]
        return []

    def inner_rank(self, module: Any | None, r: int) -> int:
        assert module is not None, "a convolution's groups are not known without the module"
        return r // module.groups  # type: ignore[no-any-return]

    def matrices(self, weight: Tensor, module: Any | None) -> Tensor:
        assert module is not None, "a convolution's groups are not known without the module"
        g: int = module.groups
        return weight.reshape(g, weight.shape[0] // g, -1)  # [g, b/g, a/g * k]

    def pack(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return A.reshape(-1, *shape[1:]), B.reshape(shape[0], B.shape[-1], *[1] * self.n)

    def beside(self, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
        g = A.shape[0] // B.shape[1]
        stacks = [t.view(g, t.shape[0] // g, *t.shape[1:]) for t in (A, A2)]  # group by group, since rows belong to groups in order
        return torch.cat(stacks, 1).flatten(0, 1), torch.cat([B, B2], 1)

    def compose(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        if A.shape[1] != shape[1]:
            raise CapabilityError(
                f"a down kernel that sees all {A.shape[1]} inputs has no grouped weight of {shape[1]} inputs that equals it",
                where="a grouped convolution, factors in the reference library's layout",
                hint="keep it unmerged, or train a new adapter here: its factors are grouped and merge",
            )
        g = A.shape[0] // B.shape[1]
        a = A.reshape(g, A.shape[0] // g, -1)  # [g, r/g, a/g * k]
        b = B.reshape(g, B.shape[0] // g, B.shape[1])  # [g, b/g, r/g]
        return (b @ a).reshape(shape)

    def down(self, x: Tensor, A: Tensor, host: Any) -> Tensor:
        groups = host.in_channels // A.shape[1]  # one group for the wide layout
        return self._convolve(x, A, host, groups)

    def up(self, h: Tensor, B: Tensor, host: Any) -> Tensor:
        return PRODUCTS[self.n - 1](h, B, groups=host.groups)

    # ---- the forward --------------------------------------------------------------------------------------------
    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs["input"]
        if x.dim() == self.n + 1 and plan.size is not None:  # unbatched: one row, whatever its number of channels
            return super().forward(host, base, plan, (x[None],), {})[0]
        return super().forward(host, base, plan, (x,), {})
