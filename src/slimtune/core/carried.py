"""Where a model goes, its adapters go: what a state dict of an adapted model holds, and `save_pretrained` does not.

An adapter's tensors stand in `model.state_dict()` as those of any other submodule, `<path>.slim.<name>.<key>.<tensor>`,
so whatever saves, restores or averages a model by its state dict has them, and loading is as strict as torch is. What
else its training goes on from (the optimizer steps that its method has seen, what the method keeps between steps) is
one more tensor of bytes, `<path>.slim.<name>._extra_state`.

An adapter that is merged is in the weights already, so it is left out as long as it is, and cannot be loaded.
`save_pretrained` writes the base alone, as other libraries expect it, and says so.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors
from torch import Tensor, nn

from slimtune.core.stepping import acts
from slimtune.core.trained import Trained

if TYPE_CHECKING:
    from slimtune.core.state import Adapter, State

MARK = ".slim."  # stands in every name of an adapter's tensor
_EXTRA, _ABOUT = "_extra_state", "slimtune"
_BASE_ONLY: ContextVar[bool] = ContextVar("slimtune_base_only", default=False)


@contextlib.contextmanager
def base_only() -> Iterator[None]:
    """Leave adapters out of every state dict made in this block."""
    token = _BASE_ONLY.set(True)
    try:
        yield
    finally:
        _BASE_ONLY.reset(token)


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of the base, names as before anything was attached."""
    with base_only():
        return model.state_dict()


def shows_base_only() -> bool:
    """Tell whether state dicts made now leave adapters out."""
    return _BASE_ONLY.get()


class Ops(nn.Module):
    """The ops of one adapter in one slot."""

    def __init__(self, state: State, name: str, path: str) -> None:
        super().__init__()
        self.slim_owner, self.name, self.path = state, name, path

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if self._merged():
            return destination if destination is not None else {}
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._keeps_more():
            destination[prefix + _EXTRA] = self._pack()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over what is beside the tensors; shapes that a method changed while it trained are made to fit first."""
        extra = prefix + _EXTRA
        tensors = {key: value for key, value in state_dict.items() if key != extra}
        super()._load_from_state_dict(tensors, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self._merged():
            if state_dict:
                error_msgs.append(f"adapter {self.name!r} is merged into the weights now, so it cannot be loaded: st.unmerge(model) first")
        elif extra in state_dict and self._keeps_more():
            try:
                self._unpack(state_dict[extra], {key.removeprefix(prefix): value for key, value in tensors.items()})
            except (SafetensorError, KeyError, ValueError, TypeError) as error:
                error_msgs.append(f"{extra} does not fit adapter {self.name!r} ({type(error).__name__}: {error}): another method, or damaged")
        elif extra in state_dict:
            unexpected_keys.append(extra)
        elif self._keeps_more():
            missing_keys.append(extra)

    # ---- what is beside the tensors -----------------------------------------------------------------------------
    def _adapter(self) -> Adapter | None:
        return self.slim_owner.adapters.get(self.name)

    def _merged(self) -> bool:
        plan = self.slim_owner.merged_plan if self.slim_owner.merged else None
        return plan is not None and self.name in plan.names

    def _counts(self) -> bool:
        """Tell whether the adapter's steps are kept here: in the first of its places."""
        adapter = self._adapter()
        return adapter is not None and any(acts(part) for part in adapter.spec.parts()) and next(iter(adapter.ops))[0] == self.path

    def _trained(self) -> dict[str, Any]:
        return {key: op for key, op in self._modules.items() if isinstance(op, Trained)}

    def _keeps_more(self) -> bool:
        return bool(self._trained()) or self._counts()

    def _pack(self) -> Tensor:
        memory: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for key, op in self._trained().items():
            tensors, facts[key] = op.training_state()
            own = op.state_dict()
            memory |= {f"{key}.{name}": t.detach().cpu().clone().contiguous() for name, t in tensors.items() if name not in own}
        about: dict[str, Any] = {"facts": facts}
        if self._counts() and (adapter := self._adapter()) is not None:
            about |= {"steps": adapter.steps, "total_steps": adapter.total_steps}
        return torch.frombuffer(bytearray(write_safetensors(memory, {_ABOUT: json.dumps(about, sort_keys=True)})), dtype=torch.uint8)

    def _unpack(self, packed: Tensor, beside: dict[str, Tensor]) -> None:
        raw = packed.detach().cpu().contiguous().numpy().tobytes()
        memory = read_safetensors(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        about = json.loads(header.get("__metadata__", {})[_ABOUT])
        if set(about["facts"]) != set(self._trained()):
            raise ValueError("it tells of other ops")
        for key, op in self._trained().items():
            mine = {name.removeprefix(f"{key}."): t for name, t in (beside | memory).items() if name.startswith(f"{key}.")}
            op.restore_training(mine, about["facts"][key])
        if self._counts() and (adapter := self._adapter()) is not None:
            adapter.steps, adapter.total_steps = about["steps"], about["total_steps"]


def forgive_merged(module: nn.Module, incompatible: Any) -> None:
    """Load post-hook of a hosted module: adapters that are merged now are neither there nor missing."""
    slot: Any = module._modules["slim"]
    plan = slot.state.merged_plan if slot.state.merged else None
    marks = [f"{MARK}{name}." for name in plan.names] if plan is not None else []
    if marks:
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not any(mark in f".{k}" for mark in marks)]


class SavesBase:
    """Mixin of every part of a model that has `save_pretrained`: it writes the base, without adapters, and says so."""

    rank = 0

    @staticmethod
    def slim_suits(base: type) -> bool:
        return hasattr(base, "save_pretrained")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        def cleaned(given: Any) -> Any:
            return {k: v for k, v in given.items() if MARK not in f".{k}"} if isinstance(given, dict) else given

        args, kwargs = tuple(map(cleaned, args)), kwargs | {key: cleaned(value) for key, value in kwargs.items()}
        names = {m.name for m in self.modules() if isinstance(m, Ops) and not m._merged()}  # type: ignore[attr-defined]
        if names and not shows_base_only():  # the whole model has said it already
            warnings.warn(
                f"save_pretrained of this {type(self).__name__} writes the base without its adapter {', '.join(sorted(names))}: "
                f"st.save(model, folder) writes an adapter, st.merge(model, out=folder) a merged model",
                stacklevel=2,
            )
        with base_only():
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
