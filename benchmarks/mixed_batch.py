"""A batch with a different adapter for each row, over the plain base forward of the same rows (whole model, no gradients).

    python -m benchmarks.mixed_batch --rows 64 --adapters 32
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
from benchmarks.training_step import alternate


def loading(adapters: int) -> tuple[Any, list[float]]:
    """Return SmolLM2 in bfloat16 with `adapters` LoRAs, and the seconds each took to attach."""
    model = smollm2(torch.bfloat16).eval()
    seconds = []
    for i in range(adapters):
        start = time.perf_counter()
        st.attach(model, st.LoRA(r=16, targets=ALL_SEVEN), name=f"a{i}")
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.01)
    return model, seconds


def reference(base: Any, adapters: int) -> Any:
    """Return the reference library's model with as many adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=list(ALL_SEVEN), init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.eval()


def run(rows: int, adapters: int, repeats: int, theirs: bool) -> dict[str, Any]:
    """Return seconds and ratios of one configuration."""
    model, seconds = loading(adapters)
    ids = torch.randint(5, 40_000, (rows, 1), generator=torch.Generator().manual_seed(0))
    names = [f"a{i % adapters}" for i in range(rows)]
    mixed, bare = st.use(model, rows=names), None
    mixed.__enter__()
    plan = model.slim_state.current()
    mixed.__exit__()
    out: dict[str, Any] = {"rows": rows, "adapters": adapters, "attach_first": seconds[0], "attach_last": statistics.median(seconds[-3:])}

    def under(which: Any) -> Callable[[], float]:
        def step() -> float:
            leave = model.slim_state.enter(which)
            try:
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False)
            finally:
                leave()
            return 0.0

        return step

    from slimtune.core.plan import Plan

    steps = {"base": under(Plan.of(bare)), "mixed": under(plan)}
    if theirs:
        other = reference(smollm2(torch.bfloat16), adapters)

        def step() -> float:
            with torch.no_grad():
                other(input_ids=ids, use_cache=False, adapter_names=names)
            return 0.0

        steps["reference"] = step
    times = alternate(steps, repeats)
    median = {k: statistics.median(v) for k, v in times.items()}
    out |= {"seconds": times, "median": median, "mixed_over_base": median["mixed"] / median["base"]}
    if theirs:
        out |= {"reference_over_base": median["reference"] / median["base"], "times_faster": median["reference"] / median["mixed"]}
    switch = []
    for i in range(50):
        start = time.perf_counter()
        st.use(model, f"a{i % adapters}")
        switch.append(time.perf_counter() - start)
    out["switch_seconds"] = statistics.median(switch)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--theirs", action="store_true")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
