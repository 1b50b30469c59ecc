"""The forward of a transformers body with virtual tokens: its arguments are extended, and what it returns for each token is cut again.

With a cache the virtual tokens enter it at the first call; later calls only extend mask and positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.core.errors import CapabilityError, PlanError
from slimtune.core.plan import Plan
from slimtune.ports.body import Body, embeddings_of
from slimtune.ports.frame import Frame
from slimtune.ports.transformers_internals import CACHE, cache_in, places_held, room_of
from slimtune.ports.virtual import every, framed, segments, virtual_tokens

# What else holds one thing for each token: what a virtual token gets there.
PER_TOKEN = {"token_type_ids": 0, "visual_pos_masks": 0, "mm_token_type_ids": 0, "global_attention_mask": 0}


def extended(host: Any, base: Callable[..., Any], plan: Plan, given: dict[str, Any]) -> Any:
    """Run a body with the virtual tokens of each row."""
    facts: Body = host.slim.facts
    where = f"{host.slim.path} ({type(host).__name__})"
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    tokens = ids if embeds is None else embeds
    if not isinstance(tokens, Tensor):
        return base(**given)  # the body's own error says what is missing
    batch, n = tokens.shape[:2]
    device = tokens.device
    parts = segments(host, plan, batch, device, "stream")
    flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    at = framed(host, parts, batch, flat, facts.causal, device)
    if mask is not None and flat is None and at.P:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(
            f"virtual tokens need the mask of the tokens [batch, tokens], and this attention_mask is {shape}",
            where=where,
            hint="pass the 2-D mask and let the model build the rest, or st.use(model, None)",
        )
    if at.P == 0 and isinstance(at.skip, int) and at.skip == 0:
        return base(**given)
    cache = cache_in(given)
    past = _past(cache, at, where)
    first = isinstance(past, int) and past == 0
    own_past = past if first else past - at.P
    _check(facts, given, at, batch, n, own_past, where)
    if mask is None and not at.even:
        mask = torch.ones(batch, n + int(own_past), dtype=torch.long, device=device)
    if mask is not None and at.P:
        given["attention_mask"] = at.mask(mask[:, : mask.shape[1] - at.P] if _is_whole(mask, n, own_past, cache) else mask)
    if facts.positions:
        own = given.get("position_ids")
        skips = not isinstance(at.skip, int) or at.skip > 0
        if own is None and (skips or ((facts.causal or facts.start > 0) and mask is not None and not facts.from_mask)):
            own = at.by_itself(n, own_past, facts.start, device, ids)
        if own is not None:
            given["position_ids"] = at.positions(own, facts.start, first)
    if not first or at.P == 0:
        return base(**given)
    table = embeddings_of(host)
    assert table is not None
    x = embeds if embeds is not None else table(ids)
    given["input_ids"], given["inputs_embeds"] = None, at.arrange(torch.cat([virtual_tokens(host, plan, parts, x, at.P), x], 1))
    for name, value in PER_TOKEN.items():
        t = given.get(name)
        if t is not None:
            given[name] = at.arrange(F.pad(t, (at.P, 0), value=value))
    out = base(**given)
    _mark(cache if cache is not None else cache_in(out), at)
    kept = {op.keep for _, chain, _ in parts for op in every(chain) if op.tokens}
    if len(kept) > 1:
        raise PlanError(
            "one batch mixes prompts that stay in the body's output with prompts that do not",
            where=where,
            hint="a prompt that stays there for a head which reads the first token, and one that does not, need batches of their own",
        )
    return out if kept == {True} else stripped(out, at, n)


def _past(cache: Any, at: Frame, where: str) -> int | Tensor:
    """Return how many places a cache holds.

    Raises:
        PlanError: it was not filled under this plan.
    """
    if cache is None:
        return 0
    length = places_held(cache)
    if torch.compiler.is_compiling():
        return length
    length = int(length)
    if length and at.P and cache.__dict__.get("slim_prompt") != at.key:
        raise PlanError(
            f"the cache was filled without the virtual tokens of this plan (it holds {length} places)",
            where=where,
            hint="run the prompt and all that follows under one plan, beginning with an empty cache",
        )
    return length


def _is_whole(mask: Tensor, n: int, past: int | Tensor, cache: Any) -> bool:
    """Tell whether a 2-D mask is as long as a static cache, which has room for the virtual tokens, instead of the tokens so far (BLOOM)."""
    if isinstance(past, int):
        return mask.shape[1] > n + past
    return mask.shape[1] == room_of(cache)  # compiled code counts the past in a tensor


def _mark(cache: Any, at: Frame) -> None:
    """Note on a cache which virtual tokens it holds."""
    if cache is not None and not torch.compiler.is_compiling():
        cache.slim_prompt = at.key


def _check(facts: Body, given: dict[str, Any], at: Frame, batch: int, n: int, past: int | Tensor, where: str) -> None:
    """Raise where the virtual tokens of a batch cannot be put into its arguments."""
    if not at.even and facts.causal and facts.absolute and not facts.positions:
        raise CapabilityError(
            "rows with prompts of different lengths need position_ids, which this body does not take",
            where=where,
            hint="use prompts of one length in a batch, or batches of one prompt each",
        )
    if torch.compiler.is_compiling():
        return
    ahead = at.moved if isinstance(at.moved, int) else int(at.moved.max())
    if facts.limit and int(past) + ahead + n > facts.limit:
        raise PlanError(
            f"{int(past) + n} tokens and {ahead} virtual ones are more than the {facts.limit} positions of this body",
            where=where,
            hint=f"cut the input to {facts.limit - ahead} tokens" if ahead < facts.limit else f"use prompts of less than {facts.limit} tokens in all",
        )
    own = given.get("position_ids")
    if facts.limit and own is not None and int(past) == 0 and (last := int(own.max())) + ahead >= facts.start + facts.limit:
        raise PlanError(
            f"position_ids go up to {last}, and {ahead} virtual tokens move that beyond the {facts.start + facts.limit} places of the table",
            where=where,
            hint=f"no position after {facts.start + facts.limit - ahead - 1}, or shorter prompts",
        )
    if at.P and own is not None and given.get("attention_mask") is None and n > 1 and bool((own.diff(dim=-1) < 0).any()):
        raise CapabilityError(
            "position_ids start anew inside a row: several sequences are packed into it, and a prompt would reach the first one only",
            where=where,
            hint="give each sequence a row of its own (no packing), with padding and an attention_mask",
        )
    known = {*PER_TOKEN, "input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_hidden_states", "encoder_attention_mask"}
    for name, value in given.items():
        counts_tokens = isinstance(value, Tensor) and (value.shape[:2] == (batch, n) or name == "cache_position")
        if at.P and counts_tokens and name not in known:
            raise CapabilityError(
                f"{name} {list(value.shape)} holds something for each token, and what a virtual token gets there is not known",
                where=where,
                hint=f"leave {name} out, or use prefix tuning, which adds no tokens",
            )


def stripped(out: Any, at: Frame, n: int) -> Any:
    """Take the virtual tokens out of everything a body returns for each token; attention maps keep their columns."""
    length = at.P + n

    def strip(t: Any) -> Any:
        if isinstance(t, tuple) and not hasattr(t, "_fields") and all(isinstance(e, Tensor) for e in t):
            return tuple(strip(e) for e in t)
        if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == length:
            return at.strip(t)
        return at.strip(t, 2) if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == length else t

    if isinstance(out, (Tensor, tuple)):
        return strip(out) if isinstance(out, Tensor) else tuple(strip(t) for t in out)
    for key in out:
        if key not in CACHE:
            out[key] = strip(out[key])
    return out


def read_longer(host: Any, plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Extend the mask through which a decoder reads the encoder's output."""
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if states is None:
        return given
    batch, length = states.shape[:2]
    at = framed(host, segments(host, plan, batch, states.device, "reader"), batch, mask, False, states.device)
    if at.P == 0 or (mask is None and at.even):
        return given
    if mask is None:
        mask = torch.ones(batch, length - at.P, dtype=torch.long, device=states.device)
    if mask.dim() != 2 or mask.shape[1] + at.P != length:
        raise PlanError(
            f"the encoder's output has {length} places; {at.P} virtual ones and a mask {list(mask.shape)} do not make them up",
            where=f"{host.slim.path} ({type(host).__name__})",
            hint="compute encoder_outputs under the same plan as the rest, and pass the 2-D mask of the input tokens",
        )
    return {**given, "encoder_attention_mask": at.mask(mask)}
