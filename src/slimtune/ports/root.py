"""The model itself: what must happen once per model, not per layer, when it is one of transformers.

`generate` repeats the rows of a plan for beams, makes room for virtual tokens in its cache and leaves masks to the body; checkpointing keeps the
plan; rows= must fit the batch. What is assumed of transformers for that stands in `ports.transformers_internals`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import PlanError
from slimtune.core.host import KeepPlan
from slimtune.core.mixing import generalise, specialise
from slimtune.core.plan import Plan
from slimtune.core.scopes import RemembersBlock
from slimtune.core.state import State
from slimtune.ports import transformers_internals as internals
from slimtune.ports import trial
from slimtune.ports.generating import cached_tokens, check_generation, prompting


def root(model: nn.Module, state: State) -> None:
    """Make a model the root of its adapters."""
    specialise(model, Rooted)
    wrap_checkpoints(model, state)
    if hasattr(model, "main_input_name"):
        model.register_forward_pre_hook(check_rows, with_kwargs=True)


def unroot(model: nn.Module) -> None:
    """Undo `root`."""
    generalise(model, Rooted)
    for key in [k for k, hook in model._forward_pre_hooks.items() if hook is check_rows]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for holder, func in internals.checkpointed(model):
        if isinstance(func, KeepPlan):
            holder[internals.CHECKPOINT] = func.func


class Rooted:
    """Mixin of the model itself: what must happen once per model, not per layer."""

    rank = 0
    slim_state: State

    @staticmethod
    def slim_suits(base: type) -> bool:
        """Tell whether a class has anything that must be done here."""
        return hasattr(base, "generate") or hasattr(base, "_set_gradient_checkpointing")

    @RemembersBlock
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the plan's rows repeated for beams and returned sequences."""
        plan = self.slim_state.current()
        if plan.size is not None:  # before it may be expanded: 4 prompts under 2 rows are a mistake, not beams
            given = [args[0] if args else None, internals.main_input(self, (), kwargs)[1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds"))]  # type: ignore[arg-type]
            prompts = next((t for t in given if isinstance(t, Tensor)), None)
            if prompts is not None:
                plan.check_batch(prompts.shape[0], "generate", type(self).__name__)
        if plan.names and prompting(self.slim_state, plan):
            trial.of_generation(self, plan, _implementation(self, kwargs), self.device)  # type: ignore[attr-defined]
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
        plan = self.slim_state.current()
        tokens = cached_tokens(self, plan) if prompting(self.slim_state, plan) else 0  # type: ignore[arg-type]
        if tokens:
            given = internals.cache_in(model_kwargs)
            chunk = generation_config.prefill_chunk_size
            check_generation(self, tokens, generation_mode, chunk, given, max_cache_length + tokens)  # type: ignore[arg-type]
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + tokens, **kwargs
        )

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """Leave the 2-D mask to the body where virtual tokens are put in front of it."""
        own = super().create_masks_for_generate(**kwargs) if hasattr(super(), "create_masks_for_generate") else None  # type: ignore[misc]
        if prompting(self.slim_state, self.slim_state.current()):
            # A class with a function of its own may want the 2-D mask as long as its cache (BLOOM): the body tells it by its length.
            return own if isinstance(own, Tensor) and own.dim() == 2 else kwargs.get("attention_mask")
        if own is not None or hasattr(super(), "create_masks_for_generate"):
            return own
        return internals.default_masks(**kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]
        wrap_checkpoints(self, self.slim_state)  # type: ignore[arg-type]


def _implementation(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Return what kind of cache `generate` is asked for."""
    config = kwargs.get("generation_config") or model.generation_config
    found = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    return None if found is None else str(found)


def check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a transformers model: rows= must fit the batch, which modules deep inside may only see flattened."""
    if torch.compiler.is_compiling():
        return
    plan = model.slim_state.current()  # type: ignore[union-attr, operator]
    if plan.size is None:
        return
    key, main = internals.main_input(model, args, kwargs)
    if isinstance(main, Tensor):
        plan.check_batch(main.shape[0], "(the model)", type(model).__name__)
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
    for holder, func in internals.checkpointed(model):
        if not isinstance(func, KeepPlan):
            holder[internals.CHECKPOINT] = KeepPlan(state, func)
