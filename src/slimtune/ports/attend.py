"""Attention layers of transformers: extra keys and values [p, heads, width] of each layer, before those of the tokens (port "attention").

Every model of the library that can change its attention function asks one registry for it, by name, and hands over the eager function of its
own file in case the name is "eager". `connect` puts a step behind that question, once per process: the function that comes back is the same
one, unless the layer it is called for holds ops of this port. So it wraps whatever is in use (eager, sdpa, flash, st.lean's), whenever that
changes, for each part of a multimodal model by itself, and the names that models test for (masks, flash attention, upcasts) stay true.

Nothing enters the cache: each call concatenates, so every cache class, beams and checkpointing see what they would see without a prefix.
A row with a shorter prefix than others, or none, has masked columns on the left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, SiteError
from slimtune.core.fold import Chain, members, put
from slimtune.core.host import Slot
from slimtune.core.mixing import base_class
from slimtune.core.plan import Plan
from slimtune.ports.linear import BlockKind
from slimtune.ports.transformers_internals import asks_registry, cache_in, intercept_attention, places_held

WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
HEADS = ("num_key_value_heads", "num_kv_heads")
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads")
SEEN = "slim_seen"  # keyword by which a layer with relative positions tells its attention function how many tokens the cache holds


@dataclass
class Facts:
    """What is known of one layer with ops.

    Attributes:
        bias_of: the layer that makes the relative-position bias this one is given (T5: the first of its stack), or None.
        reached: how many calls came through `attend`.
    """

    bias_of: Any = None
    reached: int = 0


class AttendKind(BlockKind):
    """A module whose forward asks transformers' registry for its attention function."""

    name = "attention layer"
    ports = ("output", "attention")

    def __reduce__(self) -> Any:
        return _again, ()  # another process has to connect as well

    def fits(self, module: Any) -> bool:
        return asks_registry(base_class(module))

    def connect(self, model: nn.Module, module: Any, path: str) -> None:
        """Prepare for an op that has been put onto `module`."""
        connect()
        module.slim.facts.bias_of = bias_owner(model, module, path)

    def study(self, module: Any) -> Facts:
        return Facts()

    def key_value(self, module: Any) -> tuple[int, int, int]:
        """Return (heads, width of a key, width of a value) of the keys and values this layer attends over, or zeros if it does not tell."""
        held, config = module.__dict__, module.__dict__.get("config")
        if "qk_head_dim" in held and "v_head_dim" in held:  # keys made from a latent: one for each query head
            return next((held[n] for n in QUERY_HEADS if n in held), 0), held["qk_head_dim"], held["v_head_dim"]
        asked = next((held[n] for n in QUERY_HEADS if n in held), None) or (0 if config is None else getattr(config, "num_attention_heads", 0))
        width = next((held[n] for n in WIDTHS if n in held), 0)
        made = self._key_width(module)
        if not width and made and asked and "num_key_value_groups" not in held:
            width = made // asked
        if not width:
            return 0, 0, 0
        if made:
            return made // width, width, width
        heads = next((held[n] for n in HEADS if n in held), None) or asked // held.get("num_key_value_groups", 1)
        return heads, width, width

    def _key_width(self, module: Any) -> int:
        """Return how many numbers the key projection makes, 0 where it is fused with others."""
        from slimtune.core.targets import ROLES, kind_of

        for name in ROLES["k"]:
            child = module._modules.get(name)
            kind = kind_of(child) if child is not None else None
            if kind is not None and kind.params and kind.name == "linear":
                return kind.widths(child, kind.names(child)[0])[1]
        return 0

    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        acting = {op.port for name in plan.names for op in host.slim.ops(name)}
        if "attention" not in acting:
            return super().forward(host, base, plan, args, kwargs)
        facts: Facts = host.slim.facts
        if facts.bias_of is not None and kwargs.get("key_value_states") is None:
            kwargs = {**kwargs, SEEN: _seen(host, cache_in(kwargs))}
        before = facts.reached
        out = super().forward(host, base, plan, args, kwargs) if len(acting) > 1 else base(*args, **kwargs)
        if not torch.compiler.is_compiling() and facts.reached == before:  # a compiled forward cannot count
            raise SiteError(
                f"this {type(host).__name__} ran without asking transformers for an attention function, so the extra keys and values were not seen",
                where=host.slim.path,
                hint='choose another attention first: model.set_attn_implementation("sdpa")',
            )
        return out


def _again() -> AttendKind:
    connect()
    return AttendKind()


def bias_owner(model: nn.Module, module: Any, path: str) -> nn.Module | None:
    """Return the layer that makes the relative-position bias this one is given (T5: the first of its stack), itself or None."""
    if not hasattr(type(module), "compute_bias"):
        return None
    if module.has_relative_attention_bias:
        return module  # type: ignore[no-any-return]
    stack, name = path.split(".block.")[0], path.rpartition(".")[2]
    for other, candidate in model.named_modules():
        inside = other.startswith(f"{stack}.") and other.rpartition(".")[2] == name
        if inside and hasattr(type(candidate), "compute_bias") and candidate.has_relative_attention_bias:
            return candidate
    return None  # cross-attention has no bias


def _seen(host: Any, cache: Any) -> Any:
    """Return how many tokens the cache holds for a layer."""
    return 0 if cache is None else places_held(cache, host.layer_idx)


# ---- the registry ----------------------------------------------------------------------------------------------------
def connect() -> None:
    """Have `attend` called wherever an attention function is, once per process.

    Raises:
        SiteError: this version of transformers has no registry of them.
    """
    intercept_attention(attend)


def attend(
    function: Callable[..., Any], name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Any:
    """Call an attention function, with the extra keys and values of the layer it is called for.

    Args:
        function, name: from the registry.
        module: the layer; the other arguments are those of every function of the registry: query [B, H, T, D], key and value [B, KV, S, D].
    """
    slot = module._modules.get("slim")
    facts = slot.facts if isinstance(slot, Slot) else None
    if not isinstance(slot, Slot) or not isinstance(facts, Facts):
        return function(module, query, key, value, attention_mask, **kwargs)
    seen = kwargs.pop(SEEN, 0)
    if not torch.compiler.is_compiling():
        facts.reached += 1
    found = prefixes(slot, module, key, value)
    if found is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    keys, values, visible = found
    refuse(slot, name, module, attention_mask, kwargs)
    P = keys.shape[2]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = torch.cat([_bias(facts, kwargs["position_bias"], query, P, seen), kwargs["position_bias"]], -1)
    mask = extended(attention_mask, module, name, query, key, P, visible, kwargs.get("is_causal"))
    return function(module, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask, **kwargs)


def _bias(facts: Facts, given: Tensor, query: Tensor, P: int, seen: Any) -> Tensor:
    """Return the relative-position bias of the prefix [1, H, T, P]: it stands right before position 0."""
    if facts.bias_of is None:
        return given.new_zeros(*given.shape[:-1], P)
    columns: Tensor = facts.bias_of.compute_bias(query.shape[2], P, device=given.device, past_seen_tokens=seen + P)
    return columns.to(given.dtype).expand(*given.shape[:-1], P)


def refuse(slot: Slot, name: str, module: nn.Module, mask: Any, kwargs: dict[str, Any]) -> None:
    """Raise where an attention function could not see the extra columns.

    Raises:
        CapabilityError: naming it.
    """
    reason = ""
    if mask is not None and not isinstance(mask, Tensor):
        reason = f"the block masks of {name!r} cannot be made wider"
    elif kwargs.get("cache") is not None:
        reason = f"{name!r} attends over a paged cache of its own"
    elif "flash" in name and (kwargs.get("sliding_window") is not None or kwargs.get("cu_seq_lens_k") is not None):
        reason = f"{name!r} cuts windows or packed sequences out of the keys by their numbers"
    if reason:
        where = f"{slot.path} ({type(module).__name__})"
        raise CapabilityError(f"extra keys and values find no place: {reason}", where=where, hint='model.set_attn_implementation("sdpa")')


# ---- what is put in front --------------------------------------------------------------------------------------------
def prefixes(slot: Slot, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the keys and values [B, KV, P, D] of the current plan and which rows see which of them [B, P] (None = all), or None."""
    plan = slot.state.current()
    batch = key.shape[0]
    chain = plan.uniform(slot)
    if chain is not None:
        pair = gathered(chain, slot)
        if pair is None:
            return None
        K, V = fitted(pair[0], key, slot, module), fitted(pair[1], value, slot, module)
        return K.expand(batch, -1, -1, -1), V.expand(batch, -1, -1, -1), None
    every = [(rows, gathered(chain, slot)) for rows, chain in plan.split(slot, batch, key.device, module)]
    parts = [(rows, pair) for rows, pair in every if pair is not None]
    if not parts:
        return None
    P = max(pair[0].shape[0] for _, pair in parts)
    keys, values = key.new_zeros(batch, key.shape[1], P, key.shape[3]), value.new_zeros(batch, value.shape[1], P, value.shape[3])
    visible = torch.zeros(batch, P, dtype=torch.bool, device=key.device)
    for rows, pair in parts:
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        left = P - pair[0].shape[0]
        K, V = _padded(fitted(pair[0], key, slot, module), left), _padded(fitted(pair[1], value, slot, module), left)
        keys, values = put(keys, rows, K.expand(n, -1, -1, -1), 0), put(values, rows, V.expand(n, -1, -1, -1), 0)
        sees = torch.arange(P, device=key.device) >= left
        visible = put(visible, rows, sees.expand(n, P), 0)
    return keys, values, visible


def gathered(chain: Chain, slot: Slot) -> tuple[Tensor, Tensor] | None:
    """Return the keys and values [p, heads, width] that a chain means: a stack stands one after the other, a sum is summed.

    Raises:
        CapabilityError: a weighted sum of different lengths.
    """
    pairs = []
    for link in chain:
        made, weights = [], []
        for entry, w in link:
            own = [op.rows() for op in members(entry) if op.port == "attention"]  # type: ignore[operator]
            if own:
                made.append(_one_after_the_other(own))
                weights.append(w)
        lengths = [k.shape[0] for k, _ in made]
        if len(set(lengths)) > 1:
            raise CapabilityError(
                f"a weighted sum of prefixes of different lengths ({', '.join(map(str, lengths))}) is not defined",
                where=slot.path,
                hint='stack them instead, with a list of names: ["a", "b"]',
            )
        if made:
            pairs.append((_summed([k for k, _ in made], weights), _summed([v for _, v in made], weights)))
    return _one_after_the_other(pairs) if pairs else None


def _one_after_the_other(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return pairs[0] if len(pairs) == 1 else (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))


def _summed(parts: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for t, w in zip(parts, weights, strict=True):
        t = t if w is None else w.to(t) * t
        total = t if total is None else total + t
    assert total is not None
    return total


def fitted(t: Tensor, like: Tensor, slot: Slot, module: nn.Module) -> Tensor:
    """Return [p, heads, width] as [1, heads, p, width] in the type of the layer's own keys.

    Raises:
        SiteError: the layer has other heads than it said.
    """
    if like.dim() != 4 or (like.shape[1], like.shape[3]) != tuple(t.shape[1:]):
        raise SiteError(
            f"this {type(module).__name__} attends over {list(like.shape)} (rows, heads, tokens, width), "
            f"its extra ones have {t.shape[1]} heads of {t.shape[2]}",
            where=slot.path,
            hint="leave it out with exclude=",
        )
    return t.to(dtype=like.dtype, device=like.device).transpose(0, 1).unsqueeze(0)


def _padded(t: Tensor, left: int) -> Tensor:
    return t if left == 0 else torch.nn.functional.pad(t, (0, 0, left, 0))


def extended(mask: Tensor | None, module: Any, name: str, query: Tensor, key: Tensor, P: int, visible: Tensor | None, causal: Any) -> Tensor | None:
    """Return the mask of the tokens [B or 1, 1 or H, T or 1, S] with P more columns on the left, or None where all is seen.

    Args:
        mask: as the function would get it: bool (true = seen), float (added), [B, S] for flash attention, or None.
        name: of the function. Without a mask sdpa and its like are causal by themselves; eager is not, and flash counts from the right.
        visible: which rows see which of the P columns [B, P]; None = all.
        causal: what the layer says of itself; None: its attribute counts.
    """
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(1, 1, 1, S, dtype=torch.bool, device=query.device)
        if "flash" in name:
            if visible is None:
                return None
            mask = ones.view(1, S).expand(B, S)
        elif name != "eager" and T > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril().view(1, 1, T, S)
        elif visible is None:
            return None
        else:
            mask = ones if name != "eager" else query.new_zeros(1, 1, 1, S)
    if mask.dim() == 2:
        front = torch.ones(mask.shape[0], P, dtype=mask.dtype, device=mask.device) if visible is None else visible.to(mask.dtype)
        return torch.cat([front, mask], 1)
    mask = mask[..., :S]
    if visible is None:
        shape = (*mask.shape[:-1], P)
        front = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
    else:
        seen = visible[:, None, None, :]  # [B, 1, 1, P]
        front = seen if mask.dtype == torch.bool else mask.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(mask.dtype).min)
        mask = mask.expand(B, *mask.shape[1:])
        front = front.expand(*mask.shape[:-1], P)
    return torch.cat([front, mask], -1)
