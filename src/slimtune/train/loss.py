"""The causal loss, with logits only where there is something to learn.

    loss = sum over supervised positions t of  -log softmax(head(h[t-1]))[label[t]]  /  items

With loss on completions only, most positions carry no label, and with a vocabulary of 50,000 their logits are most of the
memory and a good part of the time. A hook in front of the output projection keeps only the hidden states that are needed, so
the model's own forward runs (any architecture, any wrapper, any logit scaling after the head) and the loss is the same sum.
Models whose head is not a module of its own (or is called in another way) get the plain computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimtune.savers.head import LeanLoss
from slimtune.train.problems import problem_of
from slimtune.train.tokens import IGNORE


def supervised(labels: Tensor) -> Tensor:
    """Positions whose next token is a label.

    Args:
        labels: [b, t], -100 where nothing is to be learnt.

    Returns:
        bool [b, t]: true at position i when labels[:, i + 1] counts; the last column is false.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


def logits_at(model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, unwrapped: nn.Module | None = None) -> Tensor:
    """Logits at chosen positions only: [n, vocabulary], rows in reading order.

    Args:
        model: a causal LM, or a wrapper (DistributedDataParallel) around it.
        inputs: what its forward takes, without labels.
        positions: bool [b, t].
        unwrapped: the causal LM itself when `model` is a wrapper.
    """
    inner: Any = model if unwrapped is None else unwrapped
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if len(args) == 1 and not kept and args[0].shape[:2] == positions.shape:
            kept.append(args[0])
            return (args[0][positions].unsqueeze(0),)  # [b, t, d] -> [1, n, d]
        return None

    hook = head.register_forward_pre_hook(keep) if isinstance(head, nn.Module) else None
    try:
        outputs = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    logits: Tensor = outputs["logits"]
    if kept and logits.shape[:2] == (1, kept[0][positions].shape[0]):
        return logits[0]
    return logits[positions]


def causal_loss(model: nn.Module, inputs: Mapping[str, Any], items: Tensor | float | None, unwrapped: nn.Module | None = None) -> Tensor:
    """The mean cross-entropy of the supervised tokens of one batch.

    Args:
        model: a causal LM, or a wrapper around it.
        inputs: its inputs with labels [b, t].
        items: how many tokens the whole step holds (all micro-batches, all processes); None for this batch alone.
        unwrapped: the causal LM itself when `model` is a wrapper.

    Returns:
        A scalar in float32.
    """
    labels: Tensor = inputs["labels"]
    positions = supervised(labels)
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    logits = logits_at(model, rest, positions, unwrapped)  # [n, V]
    targets = labels[:, 1:][positions[:, :-1]].to(logits.device)  # [n]
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (max(1, targets.numel()) if items is None else items)


def has_own_loss(model: nn.Module) -> bool:
    """True when the model's own loss must be used: it adds a part of its own (load balancing of experts), or `st.lean` made it leaner still."""
    config: Any = getattr(model, "config", None)
    return isinstance(model, LeanLoss) or (hasattr(config, "output_router_logits") and bool(config.output_router_logits))


def classification_loss(model: nn.Module, inputs: Mapping[str, Any], items: Tensor | float | None, unwrapped: nn.Module | None = None) -> Tensor:
    """The mean loss of one batch of labelled texts, as the model's `problem_type` says: of a class, of each label, of a score.

    Args:
        model: a sequence classifier, or a wrapper around it.
        inputs: its inputs with labels: classes [b], marks [b, labels] or scores [b].
        items: how many numbers the labels of the whole step hold; None for this batch alone.
        unwrapped: the classifier itself when `model` is a wrapper.
    """
    labels: Tensor = inputs["labels"]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"})["logits"]  # [b, outputs]
    total = problem_of(model if unwrapped is None else unwrapped).loss(logits.float(), labels.to(logits.device))
    return total / (labels.numel() if items is None else items)
