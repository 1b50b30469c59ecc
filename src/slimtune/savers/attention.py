"""Lean attention: the kernel of `kernels.attention` for training in half precision on a CPU, torch's own everywhere else.

It registers one more attention function with transformers ("slimtune"), which any model that routes its attention through that
registry can use; masks are built as for "sdpa". Measured where it pays: bfloat16 and float16 on CPUs, up to a few hundred tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.kernels.attention import attention
from slimtune.kernels.lowrank import fusing

NAME = "slimtune"
LONGEST = 1024  # beyond it torch's tiled kernel touches less memory


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature of transformers' registry: query [B, H, T, D] -> [B, T, H, D]."""
    plain = any(kwargs.get(k) is not None for k in ("position_bias", "cache", "softcap", "s_aux"))
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    half = query.dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu"
    able = fusing(query) or (torch.compiler.is_compiling() and not torch.is_autocast_enabled(query.device.type))
    if plain or dropout or not trains or not half or not able or key.shape[2] > LONGEST or value.shape[-1] != query.shape[-1]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query.contiguous(), key, value, attention_mask, causal, scale), None


def lean_attention(model: nn.Module) -> str:
    """Switch a transformers model from torch's attention to the lean one; return why not, or ""."""
    config = model.__dict__.get("config")
    used = getattr(config, "_attn_implementation", None)
    if used != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return f"the model uses {used!r}, not torch's" if used else "no transformers model"
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return "" if config._attn_implementation == NAME else "this model does not use the registry"  # type: ignore[union-attr]


def plain_attention(model: nn.Module) -> None:
    """Undo `lean_attention`."""
    config = model.__dict__.get("config")
    if getattr(config, "_attn_implementation", None) == NAME:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
