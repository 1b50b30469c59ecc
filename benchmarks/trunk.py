"""The trunk cache: a step with adapters on the last 30 % of the blocks, from the second epoch on, beside full depth.

    python -m benchmarks.trunk --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

import slimtune as st
from benchmarks.models import inputs, ours, reference, smollm2
from benchmarks.training_step import alternate, stepper


def run(dtype: str, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Return seconds, ratios, and whether the outputs are equal to the bit."""
    base = smollm2(getattr(torch, dtype))
    data = inputs("smollm2", base, rows, tokens)
    last = f"last:{round(0.3 * base.config.num_hidden_layers)}"  # type: ignore[union-attr, arg-type]
    part, cached, full = ours(base, layers=last), ours(base, layers=last), ours(base)
    cache = st.cache_trunk(cached)
    with torch.no_grad():
        want = part(input_ids=data["input_ids"], use_cache=False).logits
        cached(input_ids=data["input_ids"], use_cache=False)
        got = cached(input_ids=data["input_ids"], use_cache=False).logits
    assert cache.hits == rows
    models = {"reference": reference(base), "full depth": full, "uncached": part, "cached": cached}
    seconds = alternate({n: stepper(m, data) for n, m in models.items()}, repeats)
    ratio = {n: statistics.median(a / b for a, b in zip(seconds["cached"], seconds[n], strict=True)) for n in models if n != "cached"}
    return {"dtype": dtype, "layers": last, "equal_bits": bool(torch.equal(got, want)), "cache": str(cache), "seconds": seconds, "cached_over": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
