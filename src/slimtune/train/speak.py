"""Greedy text generation from a prompt of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from slimtune.train.job import Job


def speak(job: Job, tokens: Sequence[int], max_new_tokens: int, show: Callable[[str], None] | None = None) -> str:
    """Return what the model writes after a prompt: its likeliest token each time, until it ends the text.

    Args:
        job: model and tokenizer.
        tokens: the prompt.
        max_new_tokens: the longest answer, in tokens.
        show: receives the text piece by piece while it is written.
    """
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if show is not None:
                show(text)

    model: Any = job.model
    device = next(model.parameters()).device
    ids = torch.tensor([list(tokens)], device=device)
    streamer = Pieces(job.tokenizer, skip_prompt=True, skip_special_tokens=True) if show is not None else None
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True  # the Trainer switches it off
    try:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=job.tokenizer.pad_token_id,
                streamer=streamer,
            )
    finally:
        model.train(training)
        model.config.use_cache = cached
    text: str = job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text
