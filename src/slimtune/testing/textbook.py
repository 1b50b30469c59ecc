"""Attention with extra keys and values by the book, to hold the attention port against: one formula, no masks made wider, no cache, no kernels.

    scores = [s q K^T + b_prefix, s q k^T + bias + mask]     out = softmax(scores) [V; v]

K and V [p, heads, width] of each layer; every query sees all of them. A relative-position bias (T5) puts them right before the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.attach import use
from slimtune.core.fold import first_tensor
from slimtune.core.plan import Which
from slimtune.core.spec import Spec
from slimtune.testing.cases import Inputs

Pairs = dict[nn.Module, tuple[Tensor, Tensor]]


@contextmanager
def by_the_book(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """Let the attention layers of a transformers model that stand in `pairs` attend by the formula above."""
    from transformers import AttentionInterface

    asked = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            if module not in pairs:
                return asked(self, name, default)(module, query, key, value, mask, **kwargs)
            return _attend(model, module, query, key, value, mask, *pairs[module], **kwargs), None

        return attend

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
    plain = {m: pair for m, pair in pairs.items() if isinstance(m, nn.MultiheadAttention)}
    for m, pair in plain.items():
        m.__dict__["forward"] = functools.partial(_attend_torch, m, *pair)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        AttentionInterface.get_interface = asked  # type: ignore[method-assign]
        for m in plain:
            del m.__dict__["forward"]


def _attend_torch(m: Any, K: Tensor, V: Tensor, query: Tensor, key: Tensor, value: Tensor, **unused: Any) -> tuple[Tensor, None]:
    """Attend as nn.MultiheadAttention without masks does, head by head and row by row."""
    if not m.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    maps = m.in_proj_weight.chunk(3) if m.in_proj_weight is not None else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    q, k, v = (x @ W.T + b for x, W, b in zip((query, key, value), maps, m.in_proj_bias.chunk(3), strict=True))
    out, d = torch.zeros_like(q), m.head_dim
    for row in range(q.shape[0]):
        for h in range(m.num_heads):
            at = slice(h * d, (h + 1) * d)
            keys, values = torch.cat([K[:, h].to(k.dtype), k[row, :, at]]), torch.cat([V[:, h].to(v.dtype), v[row, :, at]])
            out[row, :, at] = torch.softmax(q[row, :, at] @ keys.T / d**0.5, -1) @ values
    out = out @ m.out_proj.weight.T + m.out_proj.bias
    return (out if m.batch_first else out.transpose(0, 1)), None


def _attend(
    model: nn.Module, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, K: Tensor, V: Tensor, scaling: float | None = None,
    position_bias: Tensor | None = None, is_causal: bool | None = None, **unused: Any,
) -> Tensor:  # fmt: skip
    group, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v, K, V = (t.repeat_interleave(group, d) for t, d in ((k, 1), (v, 1), (K, 1), (V, 1)))
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scaling
    ahead = torch.einsum("bhtd,phd->bhtp", q, K.to(q.dtype)) * scaling
    if position_bias is not None:
        scores = scores + position_bias
        owner: Any = next((m for m in model.modules() if _makes_bias(m) and m.is_decoder == module.is_decoder), None)
        if owner is not None and not (module.is_decoder and not module.is_causal):  # attention to another stack has no bias
            past = S - T
            ahead = ahead + owner.compute_bias(T, K.shape[0] + S, past_seen_tokens=K.shape[0] + past)[..., : K.shape[0]]
    if mask is not None:
        seen = mask[..., :S]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    elif T > 1 and (module.is_causal if is_causal is None else is_causal):
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.cat([ahead, scores], -1).softmax(-1)
    p = K.shape[0]
    out = torch.einsum("bhtp,phd->bthd", weights[..., :p], V.to(q.dtype)) + torch.einsum("bhts,bhsd->bthd", weights[..., p:], v)
    return out.contiguous()


def _makes_bias(m: Any) -> bool:
    return hasattr(type(m), "compute_bias") and bool(m.has_relative_attention_bias)


@contextmanager
def later(body: nn.Module, shift: int) -> Iterator[None]:
    """Let the tokens of a body take their positions from `shift` on, counted from the first one that the mask shows."""

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else kwargs["inputs_embeds"]
        own = kwargs.get("position_ids")
        if own is None:
            own, mask = torch.arange(tokens.shape[1])[None], kwargs.get("attention_mask")
            own = own if mask is None else (own - mask.int().argmax(1, keepdim=True)).clamp(min=0)
        return args, {**kwargs, "position_ids": own + shift}

    hook = body.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def start_of(spec: Spec, model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model must give with the keys and values that a spec starts from."""
    shared: dict[str, Any] = {}
    built = [(site, spec.build(site.for_build(None, False, shared))) for site in spec.sites(model)]
    pairs: Pairs = {site.module: op.rows() for site, op in built if site.port == "attention"}  # type: ignore[operator]
    with torch.no_grad(), _moved([(site.module, op) for site, op in built if site.port == "stream"]), by_the_book(model, pairs):
        return first_tensor(model(*inputs))


@contextmanager
def _moved(bodies: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    if not bodies:
        yield
        return
    (body, op), rest = bodies[0], bodies[1:]
    with later(body, op.shift), _moved(rest):
        yield


def with_prefixes(model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], which: Which) -> Tensor:
    """Return what a layer or a body must give under a stack or a sum of prefixes, before its own other ops; those of modules in it act."""
    pairs: Pairs = {}
    for m in module.modules():
        made = _of(m, which, "attention")
        if made:
            pairs[m] = tuple(_join([op.rows()[i] for op, _ in made], [w for _, w in made]) for i in (0, 1))  # type: ignore[assignment]
    shifts = [op.shift for op, _ in _of(module, which, "stream")]
    shift = (shifts[0] if isinstance(which, dict) else sum(shifts)) if shifts else 0
    with later(module, shift) if shift else _nothing(), by_the_book(model, pairs), others_act(model, module, which):
        return first_tensor(module(*args, **kwargs))


@contextmanager
def others_act(model: nn.Module, module: nn.Module, which: Which) -> Iterator[None]:
    """Put a plan into force without the ops of `module` itself, and without those in it that stand for prefixes or virtual tokens."""
    kept: list[tuple[Any, dict[str, Any]]] = []
    for m in module.modules():
        slot: Any = m._modules.get("slim")
        for held in [] if slot is None else slot._modules.values():
            kept.append((held, dict(held._modules)))
            held._modules = {k: op for k, op in held._modules.items() if m is not module and op.port not in {"attention", "stream", "reader"}}
    try:
        with use(model, which):
            yield
    finally:
        for held, ops in kept:
            held._modules = ops


def _of(module: nn.Module, which: Which, port: str) -> list[tuple[Any, float | None]]:
    slot: Any = module._modules.get("slim")
    if slot is None or which is None:
        return []
    weights = which if isinstance(which, dict) else dict.fromkeys(which)
    return [(op, w) for name, w in weights.items() for op in slot.ops(name) if op.port == port]  # type: ignore[misc]


def _join(rows: list[Tensor], weights: list[float | None]) -> Tensor:
    if None in weights:
        return torch.cat(rows)
    total = torch.zeros_like(rows[0])
    for t, w in zip(rows, weights, strict=True):
        total = total + float(w or 0.0) * t
    return total


@contextmanager
def _nothing() -> Iterator[None]:
    yield
