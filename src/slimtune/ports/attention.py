"""nn.MultiheadAttention: packed (in_proj_weight [3 e, e]) or separate (q / k / v_proj_weight) projections, and the output projection.

Its own forward reads the weights without calling any layer, so ops act on the effective weights here, and the attention itself is torch's
function of the same weights. rows= runs each segment of the batch through its own weights. Input dropout has no place in this form and is
refused; so are ops without an exact form on the weight.

torch's encoder layers go one step further and read the weights of their linear layers too (the fast path): while ops inside act, they are
told not to (`SlowLayer`, `SlowEncoder`); with the bare base, also a merged one, the fast path is as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.core.fold import Chain, leaving, narrow, put, take
from slimtune.core.host import Slot
from slimtune.core.kind import Kind
from slimtune.core.mixing import generalise, specialise
from slimtune.core.plan import Plan
from slimtune.core.state import State
from slimtune.ports.attend import gathered
from slimtune.ports.attend_plain import attend_plain
from slimtune.ports.effective import effective, of_param
from slimtune.ports.install import install

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


class AttentionKind(Kind):
    """nn.MultiheadAttention."""

    name = "attention"
    ports = ("weight", "output", "attention")
    params = ("in_proj_weight", *SEPARATE, "out_proj")
    takes_bias = True
    drops = False

    def fits(self, module: Any) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def names(self, module: Any) -> tuple[str, ...]:
        return ("in_proj_weight", "out_proj") if module._qkv_same_embed_dim else (*SEPARATE, "out_proj")

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return tuple(self.read(module, param).shape)

    def read(self, module: Any, param: str) -> Tensor:
        return module.out_proj.weight if param == "out_proj" else getattr(module, param)  # type: ignore[no-any-return]

    def bias(self, module: Any, param: str) -> Tensor | None:
        if param == "out_proj":
            return module.out_proj.bias  # type: ignore[no-any-return]
        whole: Tensor | None = module.in_proj_bias
        return whole if whole is None or param not in SEPARATE else whole[_part(module, param)]

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        if param == "out_proj":
            return install(module.out_proj, weight=weight, bias=bias)
        if param == "in_proj_weight":
            return install(module, in_proj_weight=weight, in_proj_bias=bias)
        if bias is not None:
            e: int = module.embed_dim
            old = module._parameters["in_proj_bias"]
            whole = bias.new_zeros(3 * e) if old is None else old.detach().to(bias.dtype).clone()
            whole[_part(module, param)] = bias
            bias = whole
        return install(module, **{param: weight, "in_proj_bias": bias})

    def row_dim(self, module: Any) -> int:
        return 0 if module.batch_first else 1

    def key_value(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, width of a key, width of a value)."""
        return module.num_heads, module.head_dim, module.head_dim

    # ---- the forward --------------------------------------------------------------------------------------------
    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        chain = plan.uniform(host.slim)
        if chain is not None:
            return self._attend(host, chain, **given)
        if given["query"].dim() != 3:
            raise PlanError(
                "rows= cannot be told apart in an unbatched input", where=f"{host.slim.path} ({type(host).__name__})", hint="add a batch dimension"
            )
        return self._attend_rows(host, base, plan, given)

    def _attend_rows(self, host: Any, base: Callable[..., Any], plan: Plan, given: dict[str, Any]) -> Any:
        dim, slot = self.row_dim(host), host.slim
        query: Tensor = given["query"]
        batch = query.shape[dim]
        y = weights = None
        selectors = plan.selectors(batch, query.device, slot.path, type(host).__name__)
        for rows, (_, links) in zip(selectors, plan.segments, strict=True):
            part = self._rows_of(host, given, rows, dim, batch)
            chain = slot.chain(links)
            out, w = self._attend(host, chain, **part) if chain else base(**part)
            y = query.new_zeros(*query.shape[:-1], out.shape[-1]) if y is None else y
            y = put(y, rows, out, dim)
            if w is not None:
                weights = w.new_zeros(batch, *w.shape[1:]) if weights is None else weights
                weights = put(weights, rows, w, 0)
        return y, weights

    def _rows_of(self, host: Any, given: dict[str, Any], rows: slice | Tensor, dim: int, batch: int) -> dict[str, Any]:
        """Return the arguments of some rows of the batch; the same tensor given twice stays the same tensor."""
        cut: dict[int, Tensor] = {}
        part = dict(given)
        for name in ("query", "key", "value"):
            t = given[name]
            if id(t) not in cut:
                cut[id(t)] = take(t, rows, dim)
            part[name] = cut[id(t)]
        if given.get("key_padding_mask") is not None:
            part["key_padding_mask"] = take(given["key_padding_mask"], rows, 0)
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() == 3:  # [batch * heads, L, S]
            part["attn_mask"] = take(mask.unflatten(0, (batch, -1)), rows, 0).flatten(0, 1)
        return part

    def _attend(
        self, host: Any, chain: Chain, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x = query
        made = {p: effective(self.read(host, p), self.bias(host, p), of_param(chain, p), host) for p in self.names(host)}
        out_weight, out_bias = made["out_proj"]
        separate: dict[str, Tensor | None] = {}
        in_weight, in_bias = made.get("in_proj_weight", (None, None))
        if in_weight is None:
            separate = {p: made[p][0] for p in SEPARATE}
            in_bias = _joined([made[p][1] for p in SEPARATE], made["q_proj_weight"][0])
        turned = host.batch_first and query.dim() == 3
        if turned:
            same_k, same_v = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_k else key.transpose(0, 1)
            value = key if same_v else value.transpose(0, 1)
        pair = gathered(chain, host.slim)
        if pair is not None:
            weights_in = in_weight.chunk(3) if in_weight is not None else tuple(made[p][0] for p in SEPARATE)
            biases_in = (None, None, None) if in_bias is None else in_bias.chunk(3)
            maps = (*zip(weights_in, biases_in, strict=True), made["out_proj"])
            y, weights = attend_plain(
                host, pair, maps, query, key, value, key_padding_mask, attn_mask, need_weights, average_attn_weights
            )  # fmt: skip
        else:
            y, weights = F.multi_head_attention_forward(
                query, key, value, host.embed_dim, host.num_heads, in_weight, in_bias, host.bias_k, host.bias_v, host.add_zero_attn,
                host.dropout, out_weight, out_bias, training=host.training, key_padding_mask=key_padding_mask, need_weights=need_weights,
                attn_mask=attn_mask, use_separate_proj_weight=bool(separate), average_attn_weights=average_attn_weights, is_causal=is_causal,
                **separate,
            )  # fmt: skip
        if turned:
            y = y.transpose(0, 1)
        after = narrow(chain, lambda op: op.port == "output")
        return leaving(host, [x] * len(after), y, after), weights


def _part(module: Any, param: str) -> slice:
    """Return where the bias of a separate projection lies in in_proj_bias."""
    e: int = module.embed_dim
    i = SEPARATE.index(param)
    return slice(i * e, (i + 1) * e)


def _joined(parts: list[Tensor | None], like: Tensor) -> Tensor | None:
    if all(p is None for p in parts):
        return None
    return torch.cat([like.new_zeros(like.shape[0]) if p is None else p for p in parts])


# ---- torch's encoder layers ------------------------------------------------------------------------------------------
class SlowLayer:
    """Mixin of nn.TransformerEncoderLayer: no fast path while an adapter is in use."""

    rank = 2
    slim_switch: State

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0 if self.slim_switch.current().names else self.__dict__["activation_relu_or_gelu"]  # 0: an activation torch cannot fuse

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class SlowEncoder:
    """Mixin of nn.TransformerEncoder: no nested tensors, which only the fast path can read, while an adapter is in use."""

    rank = 2
    slim_switch: State

    @property
    def use_nested_tensor(self) -> bool:
        return not self.slim_switch.current().names and self.__dict__["use_nested_tensor"]

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def switch_fast_path(model: nn.Module, state: State) -> None:
    """Give torch's encoder layers that hold ops the mixins above, and take them from those that hold none any more."""
    for module in model.modules():
        mixin = SlowLayer if isinstance(module, nn.TransformerEncoderLayer) else SlowEncoder if isinstance(module, nn.TransformerEncoder) else None
        if mixin is None:
            continue
        if any(isinstance(m, Slot) for m in module.modules()):
            module.__dict__["slim_switch"] = state
            specialise(module, mixin)
        elif "slim_switch" in module.__dict__:
            generalise(module, mixin)
            del module.__dict__["slim_switch"]
