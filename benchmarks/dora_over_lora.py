"""What DoRA's magnitude costs on top of LoRA: a training step of each, ours and the reference library's, in processes that take turns.

    python -m benchmarks.dora_over_lora --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.training_step import contestant
from benchmarks.turns import take_turns


def run(dtype: str, repeats: int) -> dict[str, Any]:
    """Return every second, and the medians of DoRA over LoRA, pair by pair."""
    shape = {"model": "smollm2", "dtype": dtype, "rows": 4, "tokens": 256}
    makers = ("slimtune", "reference")
    contestants = {f"{who} {method}": (contestant, {"who": who, "method": method, **shape}) for who in makers for method in ("lora", "dora")}
    seconds, _ = take_turns(contestants, repeats)
    pairs = {who: zip(seconds[f"{who} dora"], seconds[f"{who} lora"], strict=True) for who in makers}
    ratio = {who: statistics.median(a / b for a, b in both) for who, both in pairs.items()}
    return {"dtype": dtype, "seconds": seconds, "median": {k: statistics.median(v) for k, v in seconds.items()}, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
