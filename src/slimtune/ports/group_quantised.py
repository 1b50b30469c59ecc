"""GroupLinear: a linear layer in 4 bits with a scale and a zero point, both float32, for every g inputs of an output.

    W[o, i] = (q[o, i] - z[o, i // g]) s[o, i // g],   q in 0 .. 15, two of them in a byte

Least and largest weight of a group are met exactly. 4 + 64 / g bits a weight: 6 with g = 32, 5 with 64. The dense weight exists only while the
layer runs, forward and backward. Scales and zero points stay float32 in a half-precision model, beside activations of any type.

Zero points that are floats make one kind of merge exact: a change of W that is the same for all inputs of a group, as QA-LoRA's is, moves
z and nothing else: the merged layer has the same codes, to the bit, and the same scales. Any other change is merged by
quantising again, which rounds each weight by up to s / 2.

Of the libraries with group-wise layers, hqq and optimum-quanto keep scales and zero points in the model's type, where 8 bits of
a bfloat16 zero point are too few to hold a merge, and their layers cannot be copied (optimum-quanto) or moved (hqq).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.errors import SpecError, TargetError
from slimtune.ports.install import install
from slimtune.ports.linear import LinearKind

LEVELS = 15
GROUP = 32


def quantise_groups(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes [b, a] in 0 .. 15, scales [b, a / g], zero points [b, a / g]) of a weight [b, a], in float32.

    Args:
        group: g, inputs that share a scale.
    """
    G = W.detach().float().unflatten(1, (-1, group))  # [b, a / g, g]
    low, high = G.amin(2), G.amax(2)
    flat = high - low <= 1e-30
    s = torch.where(flat, 1.0, (high - low) / LEVELS)
    z = -low / s
    q = torch.where(flat[..., None], 0.0, (G / s[..., None] + z[..., None]).round_().clamp_(0, LEVELS))
    return q.flatten(1).to(torch.uint8), s, z


def pack(codes: Tensor) -> Tensor:
    """Return codes [b, a] two in a byte [b, a / 2], the first in the low half; int8, as models that look at `weight.dtype` expect."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)


def unpack(packed: Tensor) -> Tensor:
    """Return the codes [b, a] of packed ones [b, a / 2], as uint8."""
    byte = packed.view(torch.uint8)
    return torch.stack([byte & 15, byte >> 4], 2).flatten(1)


def dequantise(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return W [b, a] in float32."""
    q = unpack(packed).to(scales.dtype).unflatten(1, (scales.shape[1], -1))  # [b, a / g, g]
    return ((q - zeros[..., None]) * scales[..., None]).flatten(1)


class _Product(torch.autograd.Function):
    """x W^T that keeps the codes for backward, not the dense W."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return F.linear(x, dequantise(packed, scales, zeros).to(x.dtype))  # [n, a] @ [a, b] -> [n, b]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return g @ dequantise(*ctx.saved_tensors).to(g.dtype), None, None, None


class GroupLinear(nn.Module):
    """A linear layer whose weight is kept in 4 bits, group by group.

    Args:
        linear: the layer to quantise; it is not changed.
        group: inputs that share a scale and a zero point; even, and a divisor of the layer's inputs.

    Attributes:
        weight: packed codes [b, a / 2], int8.
        scales, zeros: [b, a / g], float32.

    Raises:
        SpecError: the group does not fit.

    Example:
        >>> import torch
        >>> layer = GroupLinear(torch.nn.Linear(64, 8), group=32)
        >>> tuple(layer.weight.shape), tuple(layer.zeros.shape)
        ((8, 32), (8, 2))
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scales: Tensor
    zeros: Tensor

    def __init__(self, linear: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        if group < 2 or group % 2 or self.in_features % group:
            raise SpecError(
                f"group={group} does not fit a layer of {self.in_features} inputs",
                where=f"GroupLinear of {linear}",
                hint="an even divisor of the number of inputs, such as 32 or 64",
            )
        codes, scales, zeros = quantise_groups(linear.weight, group)
        self.weight = nn.Parameter(pack(codes), requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, [..., a] -> [..., b]."""
        y: Tensor = _Product.apply(x, self.weight, self.scales, self.zeros)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """Return W [b, a] in float32."""
        return dequantise(self.weight, self.scales, self.zeros)

    def codes(self) -> Tensor:
        """Return q [b, a], uint8."""
        return unpack(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupLinear:
        kept = {name: self._buffers[name] for name in ("scales", "zeros")}
        super()._apply(fn, recurse)
        for name, t in kept.items():  # moved with the model, but never rounded with it
            new = self._buffers[name]
            if t is not None and new is not None and new.dtype != t.dtype:
                self._buffers[name] = t.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 4 bits, group={self.group}"


def quantise(model: nn.Module, group: int = GROUP, targets: str | Iterable[str] = "all-linear", exclude: str | Iterable[str] = ()) -> list[str]:
    """Exchange a model's linear layers for group-wise 4-bit ones, in place, and return their paths.

    Args:
        model: any module, without adapters.
        group: inputs that share a scale.
        targets, exclude: which layers, as in `Spec`.

    Raises:
        TargetError: nothing is matched, or something that is no plain linear layer.
        SpecError: the group does not fit a layer; nothing has changed then.

    Example:
        >>> import torch
        >>> quantise(torch.nn.Sequential(torch.nn.Linear(64, 8)), group=32)
        ['0']
    """
    from slimtune.core.spec import Spec
    from slimtune.core.targets import find_sites

    spec = Spec(
        targets=targets if isinstance(targets, str) else tuple(targets), exclude=exclude if isinstance(exclude, str) else tuple(exclude)
    )
    sites = find_sites(model, spec, "weight")
    for site in sites:
        if type(site.module) is not nn.Linear or not site.path:
            raise TargetError("only plain nn.Linear layers inside a model can be quantised", where=str(site), hint="leave it out with exclude=")
    made = {}
    for site in sites:
        try:
            made[site.path] = GroupLinear(site.module, group)  # type: ignore[arg-type]
        except SpecError as error:
            raise SpecError(error.what, where=str(site), hint=f"{error.hint}; or leave it out with exclude=") from None
    for path, layer in made.items():
        layer.train(model.get_submodule(path).training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return list(made)


class GroupLinearKind(LinearKind):
    """GroupLinear."""

    quantised = True

    def fits(self, module: Any) -> bool:
        return isinstance(module, GroupLinear)

    def group(self, module: Any) -> int:
        """Return how many inputs share a zero point: a change that is the same for all of them merges exactly."""
        return int(module.group)

    def read(self, module: Any, param: str) -> Tensor:
        return module.dense()  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        """Move the zero points alone where that is all it takes, else quantise again."""
        if weight is None:
            return install(module, bias=bias)
        W = module.dense()
        change = (weight.float() - W).unflatten(1, (-1, module.group))  # [b, a / g, g]
        shift = change.mean(2)
        # W and W + d are each rounded once; what they differ by cannot be known better than this
        blur = 4 * torch.finfo(torch.float32).eps * (W.abs() + weight.abs().float()).unflatten(1, (-1, module.group)).amax(2)
        if bool(((change - shift[..., None]).abs().amax(2) <= blur).all()):
            return _Exchange(module, module.weight, module.scales, module.zeros - shift / module.scales, install(module, bias=bias))
        codes, scales, zeros = quantise_groups(weight, module.group)
        return _Exchange(module, nn.Parameter(pack(codes), requires_grad=False), scales, zeros, install(module, bias=bias))


class _Exchange:
    """Exchanges codes, scales and zero points with those that are not in place now."""

    def __init__(self, module: Any, weight: nn.Parameter, scales: Tensor, zeros: Tensor, bias: Callable[[], None]) -> None:
        self.module, self.bias = module, bias
        self.aside = (weight, scales, zeros)
        self._swap()

    def _swap(self) -> None:
        params, buffers = self.module._parameters, self.module._buffers
        mine = (params["weight"], buffers["scales"], buffers["zeros"])
        (params["weight"], buffers["scales"], buffers["zeros"]), self.aside = self.aside, mine

    def __call__(self) -> None:
        self._swap()
        self.bias()
