"""Combining two rank-16 LoRAs on all linear layers of SmolLM2-135M by SVD: in factored form here, from dense deltas in the reference library.

    python -m benchmarks.combine

Both libraries run in this process, in turns, on equal factors; the two results are compared weight by weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import slimtune as st
from benchmarks.models import ALL_SEVEN, smollm2

WEIGHTS = {"a": 0.5, "b": 0.5}


def theirs(r: int) -> Any:
    """Return the reference's model with adapters a and b of random values."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(ALL_SEVEN), init_lora_weights=False)
    model = get_peft_model(smollm2(torch.bfloat16), config, adapter_name="a")
    model.add_adapter("b", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape) * 0.02
    return model


def ours(reference: Any, r: int) -> Any:
    """Return our model with the same adapters."""
    model: Any = smollm2(torch.bfloat16)
    for name in WEIGHTS:
        st.attach(model, st.LoRA(r=r, alpha=2 * r, targets=ALL_SEVEN), name=name)
        for (path, _), op in st.adapters(model)[name].ops.items():
            layer = reference.base_model.model.get_submodule(path)
            op.start_from(layer.lora_A[name].weight, layer.lora_B[name].weight, frozen=False)
    return model


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def apart(reference: Any, model: Any) -> float:
    """Return the largest relative difference between the two results."""
    gaps = []
    for (path, _), op in st.adapters(model)["mix"].ops.items():
        want = reference.base_model.model.get_submodule(path).get_delta_weight("mix").float()
        gaps.append(float((op.delta() - want).norm() / want.norm()))
    return max(gaps)


def run(r: int, repeats: int) -> dict[str, Any]:
    """Return seconds of both, their ratio, and how far the results are apart."""
    reference = theirs(r)
    model = ours(reference, r)
    seconds: dict[str, list[float]] = {"slimtune": [], "reference": []}
    gap = 0.0
    names, weights = list(WEIGHTS), list(WEIGHTS.values())

    def there() -> None:
        reference.add_weighted_adapter(names, weights, "mix", combination_type="svd", svd_rank=r, svd_full_matrices=False)

    for _ in range(repeats):
        seconds["slimtune"].append(timed(lambda: st.combine(model, WEIGHTS, how="svd", r=r, name="mix")))
        seconds["reference"].append(timed(there))
        gap = max(gap, apart(reference, model))
        st.detach(model, "mix")
        reference.delete_adapter("mix")
    median = {who: statistics.median(s) for who, s in seconds.items()}
    return {
        "r": r, "weights": len(st.adapters(model)["a"].ops), "slimtune_seconds": median["slimtune"], "reference_seconds": median["reference"],
        "times_faster": median["reference"] / median["slimtune"], "largest_relative_difference": gap, "threads": torch.get_num_threads(),
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(run(options.r, options.repeats), indent=1))


if __name__ == "__main__":
    main()
