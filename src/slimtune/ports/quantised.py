"""bitsandbytes layers: Linear4bit (nf4, fp4) and Linear8bitLt, on any device they run on.

Forward, training and mixing are those of any linear map, since the layer's own forward runs. Reading dequantises to float32; writing
quantises again with the layer's own settings (so a merged layer differs from the live one by one rounding), and the exchange keeps the very
old parameter and state objects. bitsandbytes is imported only for layers that come from it.

On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight in place at its first call in eval mode: its scales are rounded to bf16,
and the kernel for the new packing passes no gradient to its input, without an error. `exact_packing` switches that off, and undoes it where it
has happened, as long as a model carries adapters: one evaluation must not stop the training of every layer below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.ports.install import install
from slimtune.ports.linear import LinearKind


def _made_by(module: Any, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


class Linear4bitKind(LinearKind):
    """bitsandbytes.nn.Linear4bit: two weights in a byte, a scale for each block."""

    quantised = True

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.Linear) and _made_by(module, "Linear4bit")

    def read(self, module: Any, param: str) -> Tensor:
        import bitsandbytes.functional as bf

        weight: Any = module.weight
        if weight.quant_state is None:  # not quantised yet: that happens when the layer is moved to its device
            return weight.detach().float()  # type: ignore[no-any-return]
        data, state = _plain_packing(weight)
        return bf.dequantize_4bit(data, state).float().view(self.shape(module, param))

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        if weight is None:
            return install(module, bias=bias)
        old: Any = module.weight
        made = type(old)(
            weight.detach().to(torch.float32 if old.quant_state is None else old.quant_state.dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        ).to(old.device)
        return _Exchange4bit(module, made, install(module, bias=bias))


class _Exchange4bit:
    """Exchanges the weight with its quantisation state, which the layer holds a second time."""

    def __init__(self, module: Any, weight: Any, bias: Callable[[], None]) -> None:
        self.module, self.bias = module, bias
        self.aside = (weight, weight.quant_state)
        self._swap()

    def _swap(self) -> None:
        module = self.module
        self.aside, (weight, state) = (module._parameters["weight"], module.quant_state), self.aside
        module._parameters["weight"], module.quant_state = weight, state

    def __call__(self) -> None:
        self._swap()
        self.bias()


def _packed(weight: Any) -> bool:
    return weight.quant_state is not None and getattr(weight.quant_state, "packing_format_for_cpu", False)


def _plain_packing(weight: Any) -> tuple[Tensor, Any]:
    """Return a weight's data and state in the packing that dequantises."""
    if not _packed(weight):
        return weight.data, weight.quant_state
    import copy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    data, state = _convert_weight_packed_for_cpu_inverse(weight.data.clone(), copy.deepcopy(weight.quant_state))
    if not state.nested:  # that function leaves plain scales in the other layout: [inputs / block, outputs] in bf16
        state.absmax = state.absmax.T.reshape(-1).float()
        state.state2 = None
    return data, state


def exact_packing(model: nn.Module, wanted: bool) -> None:
    """Keep the 4-bit layers of a model in the packing that is exact and has gradients, or let them be as they were made.

    Args:
        wanted: whether the model carries adapters.
    """
    for module in model.modules():
        if not _made_by(module, "Linear4bit") or "support_avx512bf16_for_cpu" not in module.__dict__:
            continue
        layer: Any = module
        if not wanted:
            layer.support_avx512bf16_for_cpu = layer.__dict__.pop("slim_packing", layer.support_avx512bf16_for_cpu)
        elif "slim_packing" not in layer.__dict__:
            layer.slim_packing, layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu, False
            if _packed(layer.weight):
                layer.weight.data, layer.weight.quant_state = _plain_packing(layer.weight)
                layer.quant_state = layer.weight.quant_state


class Linear8bitKind(LinearKind):
    """bitsandbytes.nn.Linear8bitLt: int8 weights, a scale for each output; W = CB * SCB / 127."""

    quantised = True

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.Linear) and _made_by(module, "Linear8bitLt")

    def read(self, module: Any, param: str) -> Tensor:
        weight: Any = module.weight
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        if scale is None:  # not quantised yet, or kept in floats and quantised at each call
            return weight.detach().float()  # type: ignore[no-any-return]
        return weight.detach().float() * (scale.float() / 127.0)[:, None]  # type: ignore[no-any-return]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        if weight is None:
            return install(module, bias=bias)
        from bitsandbytes.autograd._functions import MatmulLtState

        old: Any = module.weight
        made = type(old)(weight.detach().to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights).to(old.device)
        state: Any = MatmulLtState()
        state.threshold, state.has_fp16_weights, state.use_pool = (
            module.state.threshold, module.state.has_fp16_weights, module.state.use_pool
        )  # fmt: skip
        return _Exchange8bit(module, made, state, install(module, bias=bias))


class _Exchange8bit:
    """Exchanges the weight together with the matmul state, where the layer moves its numbers at the first call."""

    def __init__(self, module: Any, weight: Any, state: Any, bias: Callable[[], None]) -> None:
        self.module, self.bias = module, bias
        self.aside = (weight, state)
        self._swap()

    def _swap(self) -> None:
        module = self.module
        self.aside, (weight, state) = (module._parameters["weight"], module.state), self.aside
        module._parameters["weight"], module.state = weight, state

    def __call__(self) -> None:
        self._swap()
        self.bias()
