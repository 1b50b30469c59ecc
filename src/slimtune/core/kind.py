"""Kind: how one class of module takes part in adaptation (the affine map it computes, and how a forward of it is folded).

A kind is stateless and knows one module class: how to read its weight densely, write a merged one, and apply a weight or
a low-rank pair to its input. Methods never look at module classes, kinds never look at methods: m + k files, not m x k.

Canonical weight shapes: linear [b, a], convolution [b, a/groups, *k], embedding [num, dim], experts [E, b, a].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.fold import Chain, fold, fold_rows
from slimtune.core.plan import Plan
from slimtune.core.rows import fitting

NOUNS = {
    "linear": "a linear layer", "conv": "a convolution", "embedding": "an embedding", "attention": "an attention", "experts": "a block of experts",
    "attention layer": "an attention layer",
}  # fmt: skip


class Kind:
    """Base of every kind; subclasses implement the maps their modules have.

    Attributes:
        name: word used in reports and errors.
        ports: which of "weight", "input", "output" ops may sit here.
        params: names of the adaptable weights of one module, in order.
        takes_bias: whether a bias [b] can be given to a module that has none.
        channels_last: whether the b outputs are the last dimension of the output.
        drops: whether dropout of the map's input is possible.
        quantised: whether the weight is stored in fewer bits than it stands for.
    """

    name: ClassVar[str] = "module"
    ports: ClassVar[tuple[str, ...]] = ("output",)
    params: ClassVar[tuple[str, ...]] = ()
    takes_bias: ClassVar[bool] = False
    channels_last: ClassVar[bool] = True
    out_axis: ClassVar[int] = 0  # axis of the canonical weight that counts outputs
    rank_axis: ClassVar[int] = 0  # axis of A that counts the rank; the next one counts inputs
    drops: ClassVar[bool] = True
    quantised: ClassVar[bool] = False

    def connect(self, model: nn.Module, module: nn.Module, path: str) -> None:
        """Prepare the model for an op that has just been put onto `module`, where hosting it is not enough."""

    @property
    def noun(self) -> str:
        """Return the name with its article, for errors."""
        return NOUNS.get(self.name, f"a {self.name}")

    # ---- what the module is -------------------------------------------------------------------------------------
    def fits(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def problem(self, module: nn.Module) -> str:
        """Return why this very module cannot be adapted, or an empty string."""
        return ""

    def study(self, module: nn.Module) -> Any:
        """Return what `forward` needs to know of its module, worked out once: it finds it as `host.slim.facts`."""
        return None

    def names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the adaptable weights that `module` really has."""
        return self.params

    def shape(self, module: nn.Module, param: str) -> tuple[int, ...]:
        """Return the canonical shape of a weight."""
        raise NotImplementedError

    def widths(self, module: nn.Module, param: str) -> tuple[int, int]:
        """Return (inputs a, outputs b) of the map, as seen on the last dimension of its input and output."""
        shape = self.shape(module, param)
        return shape[1], shape[0]

    def bias(self, module: nn.Module, param: str) -> Tensor | None:
        """Return the bias [b] that belongs to a weight, or None."""
        bias = module._parameters.get("bias")
        return bias if isinstance(bias, Tensor) else None

    # ---- the affine map -----------------------------------------------------------------------------------------
    def read(self, module: nn.Module, param: str) -> Tensor:
        """Return the dense weight in canonical shape (a view where possible, dequantised where not)."""
        raise NotImplementedError

    def write(self, module: nn.Module, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        """Install merged values (None = unchanged); what is returned exchanges the very old objects and the new at each call."""
        raise NotImplementedError

    def apply(self, x: Tensor, weight: Tensor, host: nn.Module) -> Tensor:
        """Apply a canonical `weight` to `x` as the module would, without bias."""
        raise NotImplementedError

    def apply_op(self, x: Tensor, op: Any, host: nn.Module) -> Tensor:
        """Apply the delta of an `Additive` op to `x`; kinds with many weights in one ask the op for them one at a time."""
        return self.apply(x, op.delta(), host)

    def add_rows(self, x: Tensor, y: Tensor, ids: Tensor, rows: Tensor, host: nn.Module) -> Tensor:
        """Return y plus what a delta of the canonical weight that is zero but for the rows `ids` adds to it, without forming it.

        Args:
            x: the module's input.
            y: its output.
            ids: [k], ascending.
            rows: [k, d], in the type of y.
        """
        raise NotImplementedError

    def over_outputs(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return a vector [b] shaped so that it broadcasts over a canonical weight."""
        return v.view([-1 if d == self.out_axis else 1 for d in range(weight.dim())])

    def along_output(self, v: Tensor, y: Tensor) -> Tensor:
        """Return a vector [b] shaped so that it broadcasts over the module's output y."""
        return v

    def over_inputs(self, v: Tensor, weight: Tensor) -> Tensor:
        """Return a vector [a] shaped so that it broadcasts over a canonical weight."""
        return v

    def along_input(self, v: Tensor, x: Tensor) -> Tensor:
        """Return a vector [a] shaped so that it broadcasts over the module's input x."""
        return v

    # ---- low rank -----------------------------------------------------------------------------------------------
    def factor_shapes(self, module: nn.Module, param: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A (down) and B (up) of a rank-r delta."""
        shape = self.shape(module, param)
        return (r, shape[1]), (shape[0], r)

    def layouts(self, module: nn.Module, param: str, r: int) -> list[tuple[int, ...]]:
        """Return every shape of A that a file may hold: our own, then those of other libraries that the maps here run as well."""
        return [self.factor_shapes(module, param, r)[0]]

    def adopt(self, A: Tensor, B: Tensor) -> Tensor:
        """Return an A of another layout in our own, where it has an equal there, else as it is."""
        return A

    def rank_problems(self, module: nn.Module, param: str, r: int) -> list[str]:
        """Return what is wrong with a rank here."""
        return []

    def matrices(self, weight: Tensor, module: nn.Module | None) -> Tensor:
        """Return a canonical weight as the stack of matrices [G, m, k] whose ranks a low-rank delta bounds.

        Args:
            weight: in canonical shape.
            module: needed by kinds that cannot tell G from the shape (grouped convolutions).
        """
        return weight.reshape(1, weight.shape[0], -1)

    def pack(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return factors A [G, q, k] and B [G, m, q] of the `matrices` in the shapes that `factor_shapes` names.

        Args:
            shape: canonical, of the weight.
        """
        return A[0], B[0]

    def beside(self, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the sum of two deltas: composed, [A; A2] and [B, B2] give B A + B2 A2."""
        return torch.cat([A, A2], 0), torch.cat([B, B2], 1)

    def compose(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the dense delta of the pair in canonical shape."""
        return B @ A  # [b, r] @ [r, a] -> [b, a]

    def factorise(self, delta: Tensor, r: int, host: nn.Module | None) -> tuple[Tensor, Tensor] | None:
        """Return (A, B) of rank r whose composition is the best approximation of a canonical delta, or None if r is too high."""
        stack = self.matrices(delta, host)  # [G, m, k]
        q = self.inner_rank(host, r)
        if q > min(stack.shape[1:]):
            return None
        parts = [torch.linalg.svd(m, full_matrices=False) for m in stack]  # one matrix at a time: U, S, V of all would be large
        A = torch.stack([S[:q].sqrt()[:, None] * V[:q] for _, S, V in parts])
        B = torch.stack([U[:, :q] * S[:q].sqrt() for U, S, _ in parts])
        return self.pack(A, B, tuple(delta.shape))

    def inner_rank(self, module: nn.Module | None, r: int) -> int:
        """Return the rank each of the `matrices` gets when the op's rank is r."""
        return r

    def down(self, x: Tensor, A: Tensor, host: nn.Module) -> Tensor:
        """Apply A to the module's input: x [n, a] -> h [n, r]."""
        raise NotImplementedError

    def up(self, h: Tensor, B: Tensor, host: nn.Module) -> Tensor:
        """Apply B: h [n, r] -> [n, b]."""
        raise NotImplementedError

    # ---- the forward --------------------------------------------------------------------------------------------
    def row_dim(self, module: nn.Module) -> int:
        return 0

    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `base` and fold the plan's ops over it; the default serves every one-tensor-in, one-tensor-out module."""
        x, rest, kw = split_input(args, kwargs)
        far = host.slim.far()
        uniform = plan.uniform(host.slim)
        if uniform is not None:
            return fold(host, lambda v: join(base, v, rest, kw), x, uniform, far)
        plan = fitting(plan, host.slim, host, x, self.row_dim(host))
        parts = plan.split(host.slim, x.shape[self.row_dim(host)], x.device, host)
        return fold_rows(host, lambda v: join(base, v, rest, kw), x, parts, self.row_dim(host), far)


def split_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Take the module's main input tensor out of its arguments: the first positional one, else the first keyword tensor."""
    if args:
        return args[0], args[1:], kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, (key,), {k: v for k, v in kwargs.items() if k != key}
    raise TypeError("an adapted module was called without a tensor")


def join(base: Callable[..., Any], x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `base` with the main input put back where `split_input` found it."""
    if len(rest) == 1 and isinstance(rest[0], str):
        return base(**{rest[0]: x}, **kwargs)
    return base(x, *rest, **kwargs)


__all__ = ["Chain", "Kind", "join", "split_input"]
