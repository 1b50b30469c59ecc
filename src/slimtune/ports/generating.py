"""What `generate` of transformers must know of virtual tokens: caches hold them, masks are extended by the body, and what cannot work is refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtune.core.errors import CapabilityError, PlanError
from slimtune.core.host import Slot
from slimtune.core.plan import Plan
from slimtune.core.state import State
from slimtune.ports.transformers_internals import places_held, room_of
from slimtune.ports.virtual import at_port, measure


def prompting(state: State, plan: Plan) -> bool:
    """Tell whether a plan has any op at the stream port."""
    return any(op.port == "stream" for name in plan.names for op in state.adapters[name].ops.values())


def cached_tokens(model: nn.Module, plan: Plan) -> int:
    """Return how many virtual tokens the cache of a generating model holds at most: those in front of causal bodies."""
    most = 0
    for path, module in model.named_modules():
        slot = module._modules.get("slim")
        if isinstance(slot, Slot) and any(op.port == "stream" for name in plan.names for op in slot.ops(name)) and slot.facts is not None:
            lengths = [measure(at_port(slot.chain(links), "stream"), path)[0] for _, links in plan.segments]
            most = max([most, *lengths]) if slot.facts.causal else most
    return most


def check_generation(model: nn.Module, tokens: int, mode: Any, chunk: int | None, cache: Any, length: int) -> None:
    """Raise for ways of generating that count places of the cache as tokens.

    Args:
        tokens: virtual tokens in the cache.
        mode: transformers' generation mode.
        chunk: tokens of a chunk, if the text is read in chunks.
        cache: given by the caller, or None.
        length: places that the cache needs.
    """
    where = type(model).__name__
    if str(mode).lower().endswith("assisted_generation"):
        raise CapabilityError(
            "assisted generation takes back places of the cache by counting tokens, which virtual tokens upset",
            where=where,
            hint="generate without assistant_model and prompt_lookup_num_tokens",
        )
    if chunk is not None:
        raise CapabilityError(
            "a text read in chunks may begin with chunks of padding alone, after which virtual tokens would come too early",
            where=where,
            hint="generate without prefill_chunk_size",
        )
    if cache is None:
        return
    if int(places_held(cache)):
        raise CapabilityError(
            "generate goes on from a filled cache by counting tokens, which virtual tokens upset",
            where=where,
            hint="give it the whole text and no cache; or call the model itself with the cache, token by token",
        )
    room = room_of(cache)
    if 0 <= room < length:
        raise PlanError(
            f"the cache has {room} places, and {length} are needed, {tokens} of them for virtual tokens",
            where=where,
            hint=f"make it {tokens} places longer, or let generate make it: cache_implementation='static'",
        )
