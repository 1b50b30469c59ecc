"""Algebra within a method: where a change is linear in the trained tensors (`Op.linear_in`), the sum of adapters is one of the same method.

    change(t) = change linear in t - t0     =>     t = t0 + sum w_i (t_i - t0)        IA3: t0 = 1; dense deltas, biases, MoRA's matrix: t0 = 0

The condition is checked, place by place: same recipe but for where it goes, same settings, same constants. One op that multiplies the
weight allows no other beside it, since the two would not commute.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.algebra.build import Builder, targets
from slimtune.algebra.change import ops_at, places, site_at
from slimtune.algebra.prune import Pruning
from slimtune.core.op import Additive, Op
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter

Weighted = Sequence[tuple[Adapter, float]]
WHERE = ("targets", "layers", "exclude", "train_modules")


def closed(model: nn.Module, weighted: Weighted) -> bool:
    """Tell whether a weighted sum of these adapters is an adapter of their own method."""
    adapters = [adapter for adapter, _ in weighted]
    if any(_what(a.spec) != _what(adapters[0].spec) for a in adapters):
        return False
    for path, param in places(model, adapters):
        groups = _groups(adapters, path, param)
        if any(not _alike(ops) for ops in groups.values()):
            return False
        if len(groups) > 1 and any(hasattr(ops[0], "weight") and not isinstance(ops[0], Additive) for ops in groups.values()):
            return False
    return True


def combine_closed(model: nn.Module, weighted: Weighted, builder: Builder, pruning: Pruning | None) -> Spec:
    """Hand the ops of the sum to a builder and return their recipe; `closed` must hold."""
    spec = _recipe(model, [adapter for adapter, _ in weighted])
    known = len(spec.parts())
    made: dict[int, Any] = {}  # what was copied: ops that share tensors go on sharing them
    for path, param in places(model, [adapter for adapter, _ in weighted]):
        keys: dict[str, tuple[str, list[tuple[Op, float, str]]]] = {}
        for adapter, w in weighted:
            for (p, key), op in adapter.ops.items():
                if p == path and op.param == param:
                    keys.setdefault(_sort(op), (key, []))[1].append((op, w, adapter.name))
        for key, terms in keys.values():
            op = _sum(terms, f"{path} {param}", pruning, made)
            op.part = op.part if op.part is not None and op.part < known else None
            builder.keep(replace(site_at(model, path, param), port=op.port), key.rstrip("+"), op)
    return spec


def _sum(terms: Sequence[tuple[Op, float, str]], at: str, pruning: Pruning | None, made: dict[int, Any]) -> Op:
    first = terms[0][0]
    made[id(first.kind)] = first.kind
    new = copy.deepcopy(first, made)
    with torch.no_grad():
        for name, start in first.linear_in.items():
            held = getattr(new, name)
            if held is None:
                continue
            vectors = [(getattr(op, name).detach().to(held.device) - start, w, f"{who} {at} {name}") for op, w, who in terms]
            total = torch.stack([w * t for t, w, _ in vectors]).sum(0) if pruning is None else pruning(vectors)
            held.copy_(start + total)
    return new


def _what(spec: Spec) -> dict[str, Any]:
    return {k: v for k, v in spec.to_dict().items() if k not in WHERE}


def _sort(op: Op) -> str:
    return f"{op.method} {type(op).__qualname__} {op.port}"


def _groups(adapters: Sequence[Adapter], path: str, param: str) -> dict[str, list[Op]]:
    """Return the ops of one weight by what they are; two of one adapter in a group are no group."""
    groups: dict[str, list[Op]] = {}
    for adapter in adapters:
        ops = ops_at(adapter, path, param)
        for op in ops:
            twice = sum(_sort(other) == _sort(op) for other in ops) > 1
            groups.setdefault(f"{_sort(op)} {adapter.name if twice else ''}", []).append(op)
    return groups


def _alike(ops: Sequence[Op]) -> bool:
    first = ops[0]
    if not first.linear_in or not {name for name, _ in first.tensors()} <= set(first.linear_in):
        return False
    for op in ops[1:]:
        if op.settings() != first.settings() or _shapes(op) != _shapes(first):
            return False
        mine, theirs = _constants(first), _constants(op)
        if set(mine) != set(theirs) or not all(torch.equal(mine[k], theirs[k]) for k in mine):
            return False
    return True


def _shapes(op: Op) -> dict[str, Any]:
    return {name: None if (t := getattr(op, name)) is None else t.shape for name in op.linear_in}


def _constants(op: Op) -> dict[str, Tensor]:
    """Return the tensors of an op in which its change is not linear."""
    linear = {id(getattr(op, name)) for name in op.linear_in}
    return {name: t for name, t in (*op.named_parameters(), *op.named_buffers()) if id(t) not in linear}


def _recipe(model: nn.Module, adapters: Sequence[Adapter]) -> Spec:
    """Return the recipe that the adapters share, going to the places of all of them."""
    spec = adapters[0].spec
    if all(a.spec == spec for a in adapters):
        return spec
    plain = replace(spec, layers=None, exclude=(), train_modules=())
    if len(plain.parts()) > 1:
        return plain  # a union: its parts say where each goes
    own = {path for a in adapters for (path, _), op in a.ops.items() if op.method == spec.method}
    return replace(plain, targets=targets(model, own))
