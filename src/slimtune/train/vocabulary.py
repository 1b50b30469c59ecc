"""`st.add_tokens`: new tokens for a tokenizer and a model, of which only their own rows are trained and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slimtune.core.errors import SiteError, SpecError
from slimtune.core.placing import kind_at
from slimtune.core.state import unwrap
from slimtune.methods.trainable_tokens import TrainableTokens, input_table, output_head


def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str], *, special: bool = False) -> TrainableTokens:
    """Add tokens to a tokenizer and rows for them to a model; each new row starts as the mean of the old ones.

    Args:
        model: a transformers model, before anything is attached to it. It has no more rows than before if its table had room.
        tokenizer: a transformers tokenizer; save it beside the adapter (`tokenizer.save_pretrained`).
        tokens: their texts. One that the tokenizer has already keeps its number, and is trained as well.
        special: whether decoding may skip them.

    Returns:
        The recipe that trains their rows, in the head too; `.tokens` are their numbers. To go on with more than these rows, put it
        beside another one: `st.Union(of=(st.LoRA(), spec))`.

    Raises:
        SpecError: texts that are no tokens.
        SiteError: the model carries adapters, or has no table of tokens that can grow.

    Example:
        >>> spec = st.add_tokens(model, tokenizer, ["<call>", "</call>"])  # doctest: +SKIP
        >>> st.attach(model, spec)  # doctest: +SKIP
    """
    model = unwrap(model)
    texts = list(tokens)
    if isinstance(tokens, str) or not texts or not all(isinstance(t, str) and t for t in texts) or len(set(texts)) != len(texts):
        raise SpecError(f"tokens must be a list of different texts, not {str(tokens)[:80]!r}", hint='st.add_tokens(model, tokenizer, ["<call>"])')
    if "slim_state" in model.__dict__:
        raise SiteError("the model carries adapters, and new rows would be a new table", hint="add the tokens first, then attach or load")
    table = input_table(model)
    if table is None or not hasattr(model, "resize_token_embeddings") or kind_at(table).problem(table):
        raise SiteError(
            f"this {type(model).__name__} has no table of tokens that can grow", hint="it takes a transformers model with get_input_embeddings()"
        )
    tokenizer.add_tokens(texts, special_tokens=special)
    ids = tuple(int(i) for i in tokenizer.convert_tokens_to_ids(texts))
    if max(ids) >= table.weight.shape[0]:  # type: ignore[operator, index]
        grow(model, max(ids) + 1)
    table, head = input_table(model), output_head(model)
    assert table is not None, "it had one before"
    apart = head is not None and head._parameters.get("weight") is not table._parameters.get("weight")
    return TrainableTokens(tokens=tuple(sorted(set(ids))), head="train" if apart and kind_at(head).name == "linear" else "tied")  # type: ignore[arg-type]


def grow(model: nn.Module, size: int) -> None:
    """Give a model rows up to `size`, in its table and its head, each the mean of the rows it had."""
    old = input_table(model).weight.shape[0]  # type: ignore[union-attr, operator, index]
    training = model.training
    model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
    model.train(training)
    with torch.no_grad():
        for module in (input_table(model), output_head(model)):
            weight = None if module is None else module._parameters.get("weight")
            if weight is not None and weight.shape[0] == size:
                weight[old:] = weight[:old].to(torch.float64).mean(0).to(weight.dtype)
