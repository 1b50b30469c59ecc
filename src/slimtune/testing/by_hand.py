"""What virtual tokens must do at their sites, worked out without the port: concatenated by hand, without padding and without masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import slimtune as st
from slimtune.core.fold import first_tensor
from slimtune.core.plan import Which
from slimtune.testing.textbook import others_act


def with_prompts(model: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], which: Which) -> Tensor:
    """Return what a body, or a decoder that reads one, must give under a plan for all rows; ops of modules in it act.

    Args:
        args, kwargs: what it was called with.
    """
    given = dict(zip(module.slim.facts.names, args, strict=False)) | kwargs
    if "encoder_attention_mask" in given:
        given["encoder_attention_mask"] = None  # no input of a case is padded, and the encoder's output is longer than its mask
    ops = {name: [op for op in module.slim.ops(name) if op.port == "stream" and op.tokens] for name in which or ()}
    if not any(ops.values()):
        with others_act(model, module, which):
            return first_tensor(module(**given))
    tokens = {name: torch.cat([op.rows(None, None) for op in found]) for name, found in ops.items()}
    prompt = torch.cat(list(tokens.values()))
    if isinstance(which, dict):
        prompt = torch.stack([w * tokens[name] for name, w in which.items()]).sum(0)
    x = module.get_input_embeddings()(given["input_ids"])
    with others_act(model, module, which):
        out = first_tensor(module(**{**given, "input_ids": None, "inputs_embeds": in_front(prompt, x), "attention_mask": None}))
    return out if any(op.keep for found in ops.values() for op in found) else out[:, len(prompt) :]


def whole_model(model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what a disabled transformers model with one adapter of virtual tokens gives when they are put into its inputs by hand.

    Args:
        inputs: ids; or ids, their mask, and ids of the decoder.
    """
    ops = [(path, op) for (path, _), op in st.adapters(model)["default"].ops.items() if op.port == "stream"]
    (path, op), *behind = ops
    rows: Any = op.rows
    table = model.get_submodule(path).get_input_embeddings()
    x = in_front(rows(None, None), table(inputs[0]))
    if len(inputs) == 1:
        return first_tensor(model(inputs_embeds=x))[:, -inputs[0].shape[1] :]
    y = table(inputs[2])
    for _, other in behind:
        rows = other.rows
        y = in_front(rows(None, None), y)
    return first_tensor(model(inputs_embeds=x, decoder_inputs_embeds=y))[:, -inputs[2].shape[1] :]


def in_front(prompt: Tensor, x: Tensor) -> Tensor:
    """Return [B, p + n, d]."""
    return torch.cat([prompt.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
