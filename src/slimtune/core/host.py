"""Host: a module that carries ops in a slot, and the model itself, whose plan they follow (see `core.mixing` for how classes change)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.core.fold import entries
from slimtune.core.kind import Kind
from slimtune.core.mixing import generalise, specialise
from slimtune.core.op import Op
from slimtune.core.plan import NameLink, Plan
from slimtune.core.state import State
from slimtune.core.tap import Tap
from slimtune.kernels.dropout import forget


class Slot(nn.Module):
    """Where a hosted module keeps its ops: adapter name -> key -> op. It never shows in a state dict of the base."""

    def __init__(self, state: State, kind: Kind, path: str) -> None:
        super().__init__()
        self.state, self.kind, self.path = state, kind, path
        self.mixed: Any = None  # what a kind keeps for the plan it saw last
        self.chained: tuple[Plan | None, Any] = (None, None)  # that plan's chain here
        self.facts: Any = None  # what a kind has found out about this module
        self.taps: dict[str, Tap] = {}  # entrance -> what brings its input here

    def put(self, name: str, key: str, op: Op) -> None:
        """Keep `op` for an adapter; `key` is a weight's name or a port."""
        if name not in self._modules:
            self._modules[name] = Ops()
        self._modules[name]._modules[key] = op  # type: ignore[union-attr]
        self.forget()

    def drop(self, name: str) -> None:
        self._modules.pop(name, None)
        self.forget()

    def forget(self) -> None:
        """Let go of what was worked out for the plan seen last."""
        self.mixed, self.chained = None, (None, None)

    def ops(self, name: str) -> list[Op]:
        """Return the ops of an adapter here, in the order they were attached."""
        held = self._modules.get(name)
        return list(held._modules.values()) if held is not None else []  # type: ignore[arg-type]

    def chain(self, links: list[NameLink], param: str | None = None) -> list[list[tuple[Op, Tensor | None]]]:
        """Return the chain of ops that `links` means here (of one weight, if `param` is given)."""
        chain: list[list[tuple[Op, Tensor | None]]] = []
        for link in links:
            if len(link) == 1 and link[0][1] is None:
                chain += [[(op, None)] for op in self.ops(link[0][0]) if param is None or op.param == param]
            else:
                found = [e for name, w in link for e in entries([op for op in self.ops(name) if param is None or op.param == param], w)]
                if found:
                    chain.append(found)
        return chain

    def tap(self, model: nn.Module, path: str) -> None:
        """Have the input of another module brought here."""
        if path not in self.taps:
            self.taps[path] = Tap(self, path)
            self.taps[path].fit(model.get_submodule(path))

    def untap(self, model: nn.Module) -> None:
        """Take off the hooks that no op here needs any more."""
        needed = {op.entrance for name in self._modules for op in self.ops(name)}
        for path in [p for p in self.taps if p not in needed]:
            self.taps.pop(path).remove(model)

    def far(self) -> dict[str, Tensor | None] | None:
        """Return the inputs of the entrances that ops here read, taken from this forward."""
        return {path: tap.take() for path, tap in self.taps.items()} if self.taps else None

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return nothing: adapters are saved by `st.save`, the base stays clean."""
        return destination if destination is not None else {}

    def _load_from_state_dict(self, *args: Any) -> None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mixed": None, "chained": (None, None)}


class Ops(nn.Module):
    """The ops of one adapter in one slot."""


class Hosted:
    """Mixin of every module that carries ops."""

    rank = 1  # mixins stand in this order in front of the module's own class
    slim: Slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot: Slot = self._modules["slim"]  # type: ignore[attr-defined]  # an attribute of a module takes long to find, and this runs for every token
        plan = slot.state.current()
        base = super().forward  # type: ignore[misc]
        held = slot._modules
        for name in plan.names:
            if name in held:
                return slot.kind.forward(self, base, plan, args, kwargs)  # type: ignore[arg-type]
        return base(*args, **kwargs)


class Rooted:
    """Mixin of the model itself: what must happen once per model, not per layer."""

    rank = 0
    slim_state: State

    @staticmethod
    def slim_suits(base: type) -> bool:
        """Tell whether a class has anything that must be done here."""
        return hasattr(base, "generate") or hasattr(base, "_set_gradient_checkpointing")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the plan's rows repeated for beams and returned sequences."""
        plan = self.slim_state.current()
        leave = self.slim_state.enter(plan.expanded()) if plan.names else None
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if leave is not None:
                leave()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int, **kwargs: Any
    ) -> Any:
        """Make room for virtual tokens."""
        from slimtune.ports.generating import cached_tokens, check_generation, prompting

        plan = self.slim_state.current()
        tokens = cached_tokens(self, plan) if prompting(self.slim_state, plan) else 0  # type: ignore[arg-type]
        if tokens:
            given = model_kwargs.get("past_key_values")
            chunk = generation_config.prefill_chunk_size
            check_generation(self, tokens, generation_mode, chunk, given, max_cache_length + tokens)  # type: ignore[arg-type]
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + tokens, **kwargs
        )

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Leave the 2-D mask to the body where virtual tokens are put in front of it."""
        from slimtune.ports.generating import cached_tokens, prompting

        plan, flat = self.slim_state.current(), kwargs.get("attention_mask")
        own = super().create_masks_for_generate(**kwargs) if hasattr(super(), "create_masks_for_generate") else None  # type: ignore[misc]
        if prompting(self.slim_state, plan):
            # A class with a function of its own may want the mask as long as its cache (BLOOM); the virtual tokens in there are added later.
            whole = isinstance(own, Tensor) and own.dim() == 2
            return own[:, : own.shape[1] - cached_tokens(self, plan)] if whole else flat  # type: ignore[index, union-attr, arg-type]
        if own is not None or hasattr(super(), "create_masks_for_generate"):
            return own
        from transformers.masking_utils import create_masks_for_generate

        return create_masks_for_generate(**kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]
        wrap_checkpoints(self, self.slim_state)  # type: ignore[arg-type]


def check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a transformers model: rows= must fit the batch, which modules deep inside may only see flattened."""
    if torch.compiler.is_compiling():
        return
    plan = model.slim_state.current()  # type: ignore[union-attr, operator]
    if plan.size is None:
        return
    key: Any = model.main_input_name
    main = kwargs.get(key, args[0] if args else None)
    if isinstance(main, Tensor):
        plan.selectors(main.shape[0], main.device, "(the model)", type(model).__name__)
    ids = kwargs.get("input_ids", main if key == "input_ids" else None)
    if isinstance(ids, Tensor) and any(name.startswith(("pixel_values", "input_features", "image_", "audio_")) for name in kwargs):
        _check_media(model, plan, ids)


def _check_media(model: Any, plan: Plan, ids: Tensor) -> None:
    """Raise if rows hold different numbers of images (or sounds) and an adapter sits where only these are seen, without their rows.

    Raises:
        PlanError: naming the first such module.
    """
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    tokens: set[Any] = {getattr(model.config, name, None) for name in names} - {None}
    if all((ids.eq(token).sum(1) == ids[:1].eq(token).sum(1)).all() for token in tokens):
        return  # the same for every row: they come in blocks
    from slimtune.core.targets import heads

    words = model.get_input_embeddings()
    text = next((path for path, m in model.named_modules() if m is words), "").rpartition(".")[0]
    fine = heads(model)
    for path in (path for name in plan.names for path, _ in model.slim_state.adapter(name).ops):
        if path and path != text and not path.startswith(f"{text}." if text else "") and path not in fine:
            raise PlanError(
                "the rows of this batch hold different numbers of images or sounds, so it is not known which row what this module sees belongs to",
                where=f"{path} ({type(model.get_submodule(path)).__name__})",
                hint=f'give each row as many, or adapt the text part alone: targets="re:{text}.*_proj"',
            )


def wrap_checkpoints(model: nn.Module, state: State) -> None:
    """Make the checkpoint functions that transformers keeps on its blocks keep the plan as well."""
    for module in model.modules():
        func = module.__dict__.get("_gradient_checkpointing_func")
        if func is not None and not isinstance(func, KeepPlan):
            module.__dict__["_gradient_checkpointing_func"] = KeepPlan(state, func)


class KeepPlan:
    """A checkpoint function that runs the recomputation under the plan of the first run (see `st.keep_plan`)."""

    def __init__(self, state: State, func: Callable[..., Any]) -> None:
        self.state, self.func = state, func

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if torch.compiler.is_compiling():
            return self.func(fn, *args, **kwargs)
        plan = state.current()

        def planned(*inner: Any, **kw: Any) -> Any:
            leave = state.enter(plan)
            forget()
            try:
                return fn(*inner, **kw)
            finally:
                forget()
                leave()

        if self._reentrant(kwargs) and torch.is_grad_enabled():
            # The reentrant kind drops gradients silently when no input asks for one, as behind a frozen embedding.
            floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
            if floats and not any(isinstance(a, Tensor) and a.requires_grad for a in args):
                first = floats[0]
                args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
        return self.func(planned, *args, **kwargs)

    def _reentrant(self, kwargs: dict[str, Any]) -> bool:
        own = self.func.keywords if isinstance(self.func, functools.partial) else {}
        return bool({**own, **kwargs}.get("use_reentrant", False))


def host(module: nn.Module, state: State, kind: Kind, path: str) -> Slot:
    """Make a module a host and return its slot."""
    if "slim" not in module._modules:
        slot = Slot(state, kind, path)
        slot.facts = kind.study(module)
        module.add_module("slim", slot)
        module.register_load_state_dict_post_hook(_forgive)
        specialise(module, Hosted)
    return module._modules["slim"]  # type: ignore[return-value]


def unhost(module: nn.Module) -> None:
    """Give a module back its class once its slot is empty."""
    slot = module._modules.get("slim")
    if isinstance(slot, Slot) and not slot._modules:
        del module._modules["slim"]
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if hook is _forgive:
                del module._load_state_dict_post_hooks[key]
        generalise(module, Hosted)


def _forgive(module: nn.Module, incompatible: Any) -> None:
    """Loading a state dict into the base does not concern its adapters."""
    mine = ".slim."
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if mine not in f".{k}"]
