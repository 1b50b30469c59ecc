"""What virtual tokens must do at their sites, worked out without the port: concatenated by hand, without padding and without masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.fold import first_tensor
from slimtune.core.plan import Which


def with_prompts(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], which: Which) -> Tensor:
    """Return what a body, or a decoder that reads it, must give under a plan for all rows; the model itself is disabled.

    Args:
        args, kwargs: what it was called with.
    """
    given = dict(zip(_names(module), args, strict=False)) | kwargs
    if not any(op.port == "stream" for name in which for op in module.slim.ops(name)):  # type: ignore[union-attr]
        return first_tensor(module(**{**given, "encoder_attention_mask": None}))  # no input of a case is padded
    tokens: dict[str, Tensor] = {name: torch.cat([op.rows(None, None) for op in module.slim.ops(name) if op.tokens]) for name in which}  # type: ignore[union-attr]
    if isinstance(which, dict):
        prompt = sum(w * tokens[name] for name, w in which.items())
    else:
        prompt = torch.cat(list(tokens.values()))
    assert isinstance(prompt, Tensor)
    x = module.get_input_embeddings()(given["input_ids"])
    x = torch.cat([prompt.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
    out = first_tensor(module(**{**given, "input_ids": None, "inputs_embeds": x, "attention_mask": None}))
    kept = any(op.keep for name in which for op in module.slim.ops(name))  # type: ignore[union-attr]
    return out if kept else out[:, len(prompt) :]


def _names(module: nn.Module) -> tuple[str, ...]:
    names: tuple[str, ...] = module.slim.facts.names  # type: ignore[union-attr, assignment]
    return names


def whole_model(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what a disabled transformers model with one adapter of virtual tokens gives when they are put into its inputs by hand."""
    path, op = next((path, op) for (path, _), op in model.slim_state.adapters["default"].ops.items() if op.port == "stream")
    x = model.get_submodule(path).get_input_embeddings()(inputs[0])
    prompt = op.rows(x, None)
    x = torch.cat([prompt.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
    decoder = {"decoder_input_ids": inputs[2]} if len(inputs) > 1 else {}
    out = first_tensor(model(inputs_embeds=x, **decoder))
    return out if decoder else out[:, -inputs[0].shape[1] :]
