"""Writing text token by token with a cache, batch 1: one unmerged adapter over the bare model, ours and the reference library's.

    python -m benchmarks.decode --dtype bfloat16
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.models import ours, reference, smollm2
from benchmarks.training_step import alternate


def decoder(model: Any, ids: torch.Tensor, tokens: int) -> Callable[[], float]:
    """Return a function that writes `tokens` tokens after a prompt, greedily, with the model's cache."""

    def step() -> float:
        with torch.inference_mode():
            out = model(input_ids=ids, use_cache=True)
            cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
            for _ in range(tokens):
                out = model(input_ids=last, past_key_values=cache, use_cache=True)
                last = out.logits[:, -1:].argmax(-1)
        return 0.0

    return step


def run(dtype: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Return seconds and ratios."""
    base = smollm2(getattr(torch, dtype)).eval()
    models = {"base": copy.deepcopy(base), "slimtune": ours(base, lean=False).eval(), "reference": reference(base).eval()}
    ids = torch.randint(5, 20_000, (1, 16), generator=torch.Generator().manual_seed(0))
    seconds = alternate({name: decoder(m, ids, tokens) for name, m in models.items()}, repeats)
    over = {n: statistics.median(a / b for a, b in zip(seconds[n], seconds["base"], strict=True)) for n in ("slimtune", "reference")}
    return {"dtype": dtype, "tokens": tokens, "seconds": seconds, "over_base": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
