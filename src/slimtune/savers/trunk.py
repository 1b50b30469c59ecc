"""The trunk cache: what the blocks below the first adapted one make of an example is computed once and looked up from then on.

With adapters on the last blocks only (`layers="last:4"`), the blocks below are a fixed function of the example, as long as nothing in them is
random or trains. From the second epoch on a step costs the adapted blocks and the head alone. A hit gives the very tensor that the trunk gave
before, so outputs are those of the uncached model; nothing is approximated.

Kept bytes: tokens x width x the size of an element, for each different example, up to a limit; beyond it examples are computed as ever.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, SpecError
from slimtune.core.mixing import base_class, generalise, specialise
from slimtune.core.placing import base_modules
from slimtune.core.plan import Plan
from slimtune.core.state import State, state_of, unwrap
from slimtune.core.targets import layer_of
from slimtune.savers.trunk_store import DiskStore, MemoryStore, Store

_KNOWN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "use_cache", "return_dict", "num_items_in_batch"}
_PER_ROW = ("input_ids", "token_type_ids", "position_ids")
_RECORDS = ("output_hidden_states", "output_attentions")


@dataclass
class _Call:
    """One forward of the model.

    Attributes:
        keys: of its rows.
        spans: (first, last + 1) of each row's real tokens.
        states: what the trunk gives for each row, if all are known; else None and they are recorded.
    """

    keys: list[bytes]
    spans: list[tuple[int, int]]
    states: list[Tensor] | None


class TrunkBlock:
    """Mixin of a block below the first adapted one."""

    rank = 3
    slim_trunk: TrunkCache
    slim_at: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        return self.slim_trunk.block(self.slim_at, plain, x, args, kwargs)


class TrunkCache:
    """A cache in place on a model; `close` takes it out.

    Attributes:
        depth: how many blocks it stands for.
        hits, misses: rows looked up with and without success since it was made.
    """

    def __init__(self, model: nn.Module, stack: str, depth: int, store: Store) -> None:
        self.model, self.stack, self.depth, self.store = model, stack, depth, store
        self.hits = self.misses = 0
        self._calls = threading.local()
        self._tuple = False
        self._versions = self._version()
        blocks = model.get_submodule(stack)
        for i in range(depth):
            block = blocks._modules[str(i)]
            assert block is not None
            block.slim_trunk, block.slim_at = self, i  # type: ignore[assignment]
            specialise(block, TrunkBlock)
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    # ---- around a forward of the model ------------------------------------------------------------------------------
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls.now = None
        alone = len(args) == 1 and "input_ids" not in kwargs
        kwargs = {"input_ids": args[0], **kwargs} if alone else kwargs
        if (args and not alone) or not self._usable(kwargs):
            return None
        if self._version() != self._versions:
            self.store.clear()
            self._versions = self._version()
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        spans = [(0, ids.shape[1])] * ids.shape[0] if mask is None else _spans(mask)
        if spans is None:
            return None
        keys = [_key(kwargs, i, first, last) for i, (first, last) in enumerate(spans)]
        found = [self.store.get(k) for k in keys]
        states = [s for s in found if s is not None]
        whole = len(states) == len(keys)
        self.hits += len(keys) if whole else 0
        self.misses += 0 if whole else len(keys)
        self._calls.now = _Call(keys, spans, states if whole else None)
        return (), {**kwargs, "use_cache": False}

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._calls.now = None

    def _usable(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether this forward is a plain one: known inputs, no records of the blocks, and a plan that leaves the trunk alone."""
        ids = kwargs.get("input_ids")
        given = {k for k, v in kwargs.items() if v is not None}
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not given <= _KNOWN or torch.compiler.is_compiling():
            return False
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            return False
        config: Any = self.model.config
        if any(getattr(config, name, False) for name in _RECORDS) or (not self.model.training and kwargs.get("use_cache")):
            return False
        state = state_of(self.model)
        return first_adapted(state, state.current(), self.stack) >= self.depth and not state.merged

    # ---- inside -----------------------------------------------------------------------------------------------------
    def block(self, at: int, plain: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block of the trunk, or stand in for it."""
        call: _Call | None = getattr(self._calls, "now", None)
        if call is None:
            return plain(x, *args, **kwargs)
        if call.states is not None:
            y = self._gather(call, x) if at == self.depth - 1 else x
            return (y,) if self._tuple else y
        out = plain(x, *args, **kwargs)
        if at == self.depth - 1:
            self._tuple = isinstance(out, tuple)
            if isinstance(out, tuple) and len(out) != 1:
                raise CapabilityError(
                    "the blocks of this model give more than hidden states, so they cannot be stood in for",
                    where=f"{self.stack}.{at} ({base_class(self.model.get_submodule(self.stack)[at]).__name__})",  # type: ignore[index]
                    hint="train without the trunk cache",
                )
            y = (out[0] if self._tuple else out).detach()
            for i, (key, (first, last)) in enumerate(zip(call.keys, call.spans, strict=True)):
                self.store.put(key, y[i, first:last])
        return out

    def _gather(self, call: _Call, x: Tensor) -> Tensor:
        assert call.states is not None
        y = torch.zeros_like(x)
        for i, ((first, last), state) in enumerate(zip(call.spans, call.states, strict=True)):
            y[i, first:last] = state.to(x.device)
        return y

    # ---- validity ---------------------------------------------------------------------------------------------------
    def _version(self) -> tuple[Any, ...]:
        """Return what changes when any weight below the first adapted block does."""
        return tuple((id(p), p._version) for p in _trunk_parameters(self.model, self.stack, self.depth))

    def close(self) -> None:
        """Take the cache out of the model; a cache on disk stays there for the next run."""
        for hook in self._hooks:
            hook.remove()
        blocks = self.model.get_submodule(self.stack)
        for i in range(self.depth):
            block = blocks._modules[str(i)]
            assert block is not None
            generalise(block, TrunkBlock)
            block.__dict__.pop("slim_trunk", None)
            block.__dict__.pop("slim_at", None)
        self.store.close()

    def __str__(self) -> str:
        return f"trunk cache: {self.depth} blocks of {self.stack}, {self.store}"


def cache_trunk(model: nn.Module, *, limit: float = 4.0, folder: str | Path | None = None) -> TrunkCache:
    """Compute the blocks below the first adapted one once for each example, and look them up from then on.

    Args:
        model: a transformers model with one stack of blocks and an adapter, in use, on its last blocks only.
        limit: the most to keep, in GiB; examples beyond it are computed as ever.
        folder: keep it there, on disk, instead of in memory; another run with the same base finds it again.

    Returns:
        The cache; `close()` takes it out again.

    Raises:
        CapabilityError: the lowest adapted block is the first one, there are several stacks, or something in the trunk is random or trains.

    Example:
        >>> st.attach(model, st.LoRA(layers="last:9"))  # doctest: +SKIP
        >>> cache = st.cache_trunk(model)  # doctest: +SKIP
    """
    model = unwrap(model)
    state = state_of(model)
    if limit <= 0:
        raise SpecError(f"limit must be positive, not {limit} GiB")
    stacks = {".".join(p.split(".")[:-1]) for p, m in base_modules(model).items() if p.rpartition(".")[2] == "0" and _is_block(model, p)}
    if len(stacks) != 1 or not hasattr(model, "config"):
        raise CapabilityError(
            f"the trunk cache needs a transformers model with one stack of blocks, and finds {len(stacks)}",
            where=", ".join(sorted(stacks)) or type(model).__name__, hint="train without it",
        )  # fmt: skip
    stack = stacks.pop()
    depth = first_adapted(state, state.current(), stack)
    if depth < 1:
        raise CapabilityError(
            "the adapter in use acts on the first block or before it, so there is no trunk to keep",
            where=stack, hint='adapt the last blocks only, such as layers="last:4"',
        )  # fmt: skip
    _must_be_fixed(model, stack, depth)
    most = int(limit * 2**30)
    store: Store = MemoryStore(most)
    if folder is not None:
        from slimtune.files.fingerprint import fingerprint

        digest = hashlib.sha256(repr(sorted(fingerprint(model).to_dict().items())).encode()).hexdigest()[:16]
        store = DiskStore(Path(folder) / f"{digest}-{depth}-{str(model.dtype).removeprefix('torch.')}", most)
    return TrunkCache(model, stack, depth, store)


def first_adapted(state: State, plan: Plan, stack: str) -> int:
    """Return the index of the lowest block that a plan's adapters act on; 0 if they act on anything in front of the blocks."""
    lowest = 1 << 30
    for name in plan.names:
        for (path, _), op in state.adapter(name).ops.items():
            at = layer_of(path)
            if at is not None and at[0] == stack:
                lowest = min(lowest, at[1])
            elif op.port in {"stream", "attention"} or _in_front(path, stack):
                return 0
    return lowest if lowest < 1 << 30 else 0


def _in_front(path: str, stack: str) -> bool:
    """Tell whether a module outside the stack could act before it: embeddings and the like do; heads and last norms do not."""
    last = path.rpartition(".")[2].lower()
    return "emb" in path.lower() or last in {"wte", "wpe"} or path == stack or stack.startswith(f"{path}.") or not path


def _is_block(model: nn.Module, path: str) -> bool:
    inside = model.get_submodule(path)
    return len(inside._modules) > 1 and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.ModuleList)


def _trunk_parameters(model: nn.Module, stack: str, depth: int) -> Iterator[Tensor]:
    """Yield the parameters of the blocks below `depth` and of everything in front of the stack."""
    for path, module in base_modules(model).items():
        at = layer_of(path)
        if (at is not None and at[0] == stack and at[1] < depth) or (at is None and _in_front(path, stack)):
            yield from (p for p in module._parameters.values() if p is not None)


def _must_be_fixed(model: nn.Module, stack: str, depth: int) -> None:
    for path, module in base_modules(model).items():
        at = layer_of(path)
        if not (at is None and _in_front(path, stack)) and not (at is not None and at[0] == stack and at[1] < depth):
            continue
        random = module.p if isinstance(module, nn.Dropout) else max(
            (v for k, v in module.__dict__.items() if "drop" in k and isinstance(v, float)), default=0.0
        )  # fmt: skip
        if random > 0:
            raise CapabilityError(
                f"the blocks below the first adapted one drop activations at random (p = {random:g}), so they give something else each time",
                where=f"{path} ({base_class(module).__name__})",
                hint="load the model with its dropout set to 0 (config.attention_dropout=0, hidden_dropout_prob=0, ...), or train without the cache",
            )
        if any(p is not None and p.requires_grad for p in module._parameters.values()):
            raise CapabilityError("a weight below the first adapted block trains", where=path, hint="freeze it, or train without the cache")


def _spans(mask: Tensor) -> list[tuple[int, int]] | None:
    """Return the (first, last + 1) real token of each row, or None if a row's tokens are not all together."""
    seen = mask.to(torch.bool)
    counts = seen.sum(1)
    first = seen.int().argmax(1)
    spans = list(zip(first.tolist(), (first + counts).tolist(), strict=True))
    together = all(bool(seen[i, a:b].all()) and b > a for i, (a, b) in enumerate(spans))
    return spans if together else None


def _key(kwargs: dict[str, Any], row: int, first: int, last: int) -> bytes:
    """Return what a row's trunk depends on: its tokens, and where they start (positions count from the left edge)."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{first} ".encode())
    for name in _PER_ROW:
        t = kwargs.get(name)
        if t is not None:
            t = t[row if t.shape[0] > 1 else 0, first:last]
            digest.update(name.encode() + t.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return digest.digest()
