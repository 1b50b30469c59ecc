"""A base whose modules are replaced or resized under its adapters: refused by name, for an op there would act no more, or on other weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtune.core.errors import SiteError
from slimtune.core.host import Slot
from slimtune.core.state import Adapter


def check_hosts(model: nn.Module, adapter: Adapter) -> None:
    """Raise unless every op of an adapter still sits where it was put, on a weight of the same shape.

    Raises:
        SiteError: naming the modules that were replaced or resized since.
    """
    wrong = []
    for (path, _), op in adapter.ops.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            wrong.append(f"{path} is gone")
            continue
        slot = module._modules.get("slim")
        if not isinstance(slot, Slot) or all(held is not op for held in slot.ops(adapter.name)):
            wrong.append(f"{path} was replaced")
        elif op.port == "weight" and slot.kind.params and slot.kind.shape(module, op.param) != op.shape:
            wrong.append(f"{path} was resized from {list(op.shape)} to {list(slot.kind.shape(module, op.param))}")
    if wrong:
        raise SiteError(
            f"the base was changed under adapter {adapter.name!r}, which does not act there any more: {'; '.join(dict.fromkeys(wrong[:6]))}",
            where=type(model).__name__,
            hint=f"change the base first, then attach: st.detach(model, {adapter.name!r}), and attach or load again",
        )


class Fuses:
    """Mixin of blocks that make one layer out of the weights of several (diffusers, fuse_qkv_projections): it would know nothing of adapters."""

    rank = 0

    @staticmethod
    def slim_suits(base: type) -> bool:
        return hasattr(base, "fuse_projections")

    def fuse_projections(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        slots = [slot for m in module.children() if isinstance(slot := m._modules.get("slim"), Slot)]
        if slots:
            names = sorted({name for slot in slots for name in slot._modules})
            raise SiteError(
                f"projections that carry an adapter ({', '.join(names)}) cannot be fused: the fused layer would be made from the bare weights",
                where=", ".join(slot.path for slot in slots[:4]),
                hint="fuse first and attach then; or make the adapter part of the weights before: st.merge(model, keep=False)",
            )
        return super().fuse_projections(*args, **kwargs)  # type: ignore[misc]


class Resizes:
    """Mixin of every part of a model whose tables of tokens can be resized: not under adapters that sit on them."""

    rank = 0

    @staticmethod
    def slim_suits(base: type) -> bool:
        return hasattr(base, "resize_token_embeddings")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if new_num_tokens is not None:
            model: Any = self
            tables = {id(t) for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None}
            held = [(path, m) for path, m in model.named_modules() if id(m) in tables and isinstance(m._modules.get("slim"), Slot)]
            if held:
                names = sorted({name for _, m in held for name in m._modules["slim"]._modules})  # type: ignore[union-attr]
                raise SiteError(
                    f"tokens cannot be added or taken away while an adapter ({', '.join(names)}) sits on {', '.join(path for path, _ in held)}",
                    where=f"resize_token_embeddings({new_num_tokens})",
                    hint="resize before st.attach: "
                    + ", ".join(f"st.detach(model, {name!r})" for name in names)
                    + f", model.resize_token_embeddings({new_num_tokens}), then attach",
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)  # type: ignore[misc]
