"""What DoRA's magnitude costs on top of LoRA: a training step of each, ours and the reference library's, in one process, taking turns.

    python -m benchmarks.dora_over_lora --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.models import inputs, ours, reference, smollm2
from benchmarks.training_step import alternate, stepper


def run(dtype: str, repeats: int) -> dict[str, Any]:
    """Return every second, and the medians of DoRA over LoRA, pair by pair."""
    base = smollm2(getattr(torch, dtype))
    data = inputs("smollm2", base, 4, 256)
    makers = {"slimtune": ours, "reference": reference}
    steps = {f"{who} {method}": stepper(make(base, method=method), data) for who, make in makers.items() for method in ("lora", "dora")}
    seconds = alternate(steps, repeats)
    pairs = {who: zip(seconds[f"{who} dora"], seconds[f"{who} lora"], strict=True) for who in makers}
    ratio = {who: statistics.median(a / b for a, b in both) for who, both in pairs.items()}
    return {"dtype": dtype, "seconds": seconds, "median": {k: statistics.median(v) for k, v in seconds.items()}, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
