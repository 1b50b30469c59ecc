"""Linear maps: nn.Linear (and every quantised class that subclasses it) and transformers' Conv1D, whose weight is stored transposed.

y = x W^T + bias, W [b, a], x [..., a].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.bank import Bank
from slimtune.core.errors import MergeError
from slimtune.core.host import Slot
from slimtune.core.kind import Kind
from slimtune.core.mixing import base_class
from slimtune.core.plan import Plan
from slimtune.core.rows import fitting
from slimtune.kernels.lowrank import fusing, linear_low_rank
from slimtune.kernels.mixed import add_mixed
from slimtune.ports.install import install
from slimtune.ports.own_forward import own_forward_problem

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FEW_TOKENS = 512  # below it a mixed batch runs as two batched products, above it adapter by adapter


class LinearKind(Kind):
    """nn.Linear."""

    name = "linear"
    ports = ("weight", "input", "output")
    params = ("weight",)
    takes_bias = True

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.Linear)

    def problem(self, module: Any) -> str:
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) and not self.quantised else None
        return "" if weight is None or weight.dtype not in FLOATS else own_forward_problem(module)

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return (module.out_features, module.in_features)

    def read(self, module: Any, param: str) -> Tensor:
        weight: Tensor = module.weight
        if weight.dtype not in FLOATS:
            raise MergeError(
                f"a {base_class(module).__name__} keeps its weight as {weight.dtype}, and how to read that is not known",
                hint="use it unmerged, or load the model unquantised",
            )
        return weight

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        return install(module, weight=weight, bias=bias)

    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def add_rows(self, x: Tensor, y: Tensor, ids: Tensor, rows: Tensor, host: Any) -> Tensor:
        return y.index_add(-1, ids, F.linear(x.to(rows.dtype), rows))  # [n, a] @ [a, k] -> [n, k], at k of the b outputs

    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As in `Kind`, but one low-rank op on a plain nn.Linear runs fused with it, a magnitude over it as well."""
        chain = plan.uniform(host._modules["slim"])
        if chain is not None and len(chain) == 1 and len(chain[0]) == 1 and len(args) == 1 and _frozen_plain(host) and fusing(args[0]):
            op, w = chain[0][0]
            # Asked of the classes: what a module does not have takes long to miss, and this runs for every token written.
            adds: Any = op if hasattr(type(op), "low_rank") else op.inner if w is None and hasattr(type(op), "magnify") else None
            fused = adds.low_rank() if hasattr(type(adds), "low_rank") else None
            if fused is not None:
                A, B, scale, p = fused
                weight, bias = host._parameters["weight"], host._parameters["bias"]
                if adds is op:
                    return linear_low_rank(args[0], weight, bias, A, B, scale if w is None else scale * float(w), p)
                return op.magnify(linear_low_rank(args[0], weight, None, A, B, scale, p), bias, host, [])  # type: ignore[operator]
        if chain is None and len(args) == 1 and not torch.is_grad_enabled():
            mixed = self._mixed(host, plan, args[0], base)
            if mixed is not None:
                return mixed
        return super().forward(host, base, plan, args, kwargs)

    def _mixed(self, host: Any, plan: Plan, x: Tensor, base: Callable[..., Any]) -> Tensor | None:
        """Run rows that have one low-rank op each or none, when tokens are few; None: it is the general way's turn."""
        if len(plan.segments) < 3 or x.dim() < 2 or x.numel() > FEW_TOKENS * x.shape[-1] or not fusing(x):
            return None
        slot: Slot = host.slim
        plan = fitting(plan, slot, host, x)
        mixture = plan.mixture(x.shape[0], slot.path, type(host).__name__)
        if mixture is None:
            return None
        if slot.bank is None:
            slot.bank = Bank(slot)
        places = slot.bank.find(mixture)
        return None if places is None else add_mixed(base(x), x, mixture, places)

    def down(self, x: Tensor, A: Tensor, host: Any) -> Tensor:
        return F.linear(x, A)  # [n, a] @ [a, r] -> [n, r]

    def up(self, h: Tensor, B: Tensor, host: Any) -> Tensor:
        return F.linear(h, B)  # [n, r] @ [r, b] -> [n, b]


def _frozen_plain(host: Any) -> bool:
    """Tell whether a host is a plain nn.Linear whose own parameters get no gradient, and are neither computed nor distributed tensors."""
    cls, weight, bias = type(host), host._parameters.get("weight"), host._parameters.get("bias")
    if cls.slim_base is not nn.Linear or cls.slim_patched or type(weight) is not nn.Parameter:
        return False
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


class Conv1DKind(LinearKind):
    """transformers' Conv1D (GPT-2): a linear layer with weight [a, b]."""

    def fits(self, module: Any) -> bool:
        return type(module).__name__ == "Conv1D" and "nf" in module.__dict__

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        a, b = module.weight.shape
        return (b, a)

    def read(self, module: Any, param: str) -> Tensor:
        return module.weight.T  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        return super().write(module, param, None if weight is None else weight.T.contiguous(), bias)


class BlockKind(Kind):
    """Any module whose output starts with a tensor: a place for output ops only."""

    name = "module"
    ports: ClassVar[tuple[str, ...]] = ("output",)

    def fits(self, module: Any) -> bool:
        return True

    def widths(self, module: Any, param: str) -> tuple[int, int]:
        """Return the widths of the first and last linear map inside; of the experts alone, where it holds some."""
        from slimtune.core.targets import kind_of

        inner = [(kind_of(m), m) for m in module.modules()]
        for name in ("experts", "linear"):
            maps = [k.widths(m, p) for k, m in inner if k is not None and k.name == name for p in k.names(m)]
            if maps:
                return maps[0][0], maps[-1][1]
        return 0, 0

    def names(self, module: Any) -> tuple[str, ...]:
        return ()


__all__ = ["BlockKind", "Conv1DKind", "LinearKind"]
