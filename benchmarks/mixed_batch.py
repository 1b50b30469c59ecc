"""A batch with a different adapter for each row, over the plain base forward of the same rows (whole model, no gradients).

    python -m benchmarks.mixed_batch --rows 64 --adapters 32 --theirs
    python -m benchmarks.mixed_batch --rows 64 --adapters 32 --resident 32 1000 --r 4    # of rank 16, a thousand take 20 GB

As a server does it: a new random mixture for each step, chosen among all adapters that are resident, in a `with st.use(...)` around the forward.
The reference library gets its mixtures by `adapter_names=`, in the same process, turn about, with as many adapters as a mixture holds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import slimtune as st
from benchmarks.models import ALL_SEVEN, smollm2
from benchmarks.training_step import alternate


def attach(model: Any, adapters: range, r: int) -> list[float]:
    """Add LoRAs of random values and return the seconds each took to attach."""
    seconds = []
    for i in adapters:
        start = time.perf_counter()
        st.attach(model, st.LoRA(r=r, targets=ALL_SEVEN), name=f"a{i}")
        seconds.append(time.perf_counter() - start)
        with torch.no_grad():
            for p in st.adapters(model)[f"a{i}"].parameters():
                p.normal_(std=0.01)
    return seconds


def reference(base: Any, adapters: int, r: int) -> Any:
    """Return the reference library's model with as many adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, target_modules=list(ALL_SEVEN), init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.eval()


def mixtures(rows: int, adapters: int, resident: int) -> Callable[[], list[str]]:
    """Return what draws the next mixture: `adapters` of those resident, each for as many rows, in any order."""
    draw = random.Random(0)

    def following() -> list[str]:
        chosen = draw.sample(range(resident), adapters)
        names = [f"a{chosen[i % adapters]}" for i in range(rows)]
        draw.shuffle(names)
        return names

    return following


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Return medians over that of the base: those of a round compare, as the machine has slow and fast phases."""
    median = {k: statistics.median(v) for k, v in times.items()}
    found = {f"{k}_over_base": statistics.median(a / b for a, b in zip(v, times["base"], strict=True)) for k, v in times.items() if k != "base"}
    if "reference" in median:
        found["times_faster"] = statistics.median(a / b for a, b in zip(times["reference"], times["mixed"], strict=True))
    return found


def run(rows: int, adapters: int, resident: list[int], repeats: int, r: int, theirs: bool) -> dict[str, Any]:
    """Return seconds and ratios of one configuration, for each number of resident adapters."""
    model = smollm2(torch.bfloat16).eval()
    other = reference(smollm2(torch.bfloat16), adapters, r) if theirs else None
    ids = torch.randint(5, 40_000, (rows, 1), generator=torch.Generator().manual_seed(0))
    first_of_all: list[float] = []
    found: list[dict[str, Any]] = []
    there = 0
    for n in sorted({max(n, adapters) for n in resident or [adapters]}):
        attached = attach(model, range(there, n), r)
        first_of_all, there = first_of_all or attached, n
        ours, same = mixtures(rows, adapters, n), mixtures(rows, adapters, adapters)

        def base() -> float:
            with st.use(model, None), torch.no_grad():
                model(input_ids=ids, use_cache=False)
            return 0.0

        def mixed(following: Callable[[], list[str]] = ours) -> float:
            with st.use(model, rows=following()), torch.no_grad():
                model(input_ids=ids, use_cache=False)
            return 0.0

        def peft(following: Callable[[], list[str]] = same) -> float:
            with torch.no_grad():
                other(input_ids=ids, use_cache=False, adapter_names=following())  # type: ignore[misc]
            return 0.0

        start = time.perf_counter()
        mixed()
        entering = time.perf_counter() - start  # the adapters move side by side, once
        steps = {"base": base, "mixed": mixed, **({"reference": peft} if theirs and not found else {})}
        times = alternate(steps, repeats)
        one = {"resident": n, "first_batch_seconds": entering, "attach_last": statistics.median(attached[-3:]), **ratios(times), "seconds": times}
        found.append(one)
    switch = []
    for i in range(50):
        start = time.perf_counter()
        st.use(model, f"a{i % adapters}")
        switch.append(time.perf_counter() - start)
    out: dict[str, Any] = {"rows": rows, "adapters": adapters, "r": r, "attach_first": first_of_all[0], "switch_seconds": statistics.median(switch)}
    out |= {k: v for k, v in found[0].items() if k not in ("resident", "first_batch_seconds", "seconds")}
    return out | {"resident": found, "mixed_over_fewest_resident": found[-1]["mixed_over_base"] / found[0]["mixed_over_base"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32, help="in one batch")
    parser.add_argument("--resident", type=int, nargs="*", default=[], help="on the model; default: as many as in a batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--r", type=int, default=16, help="rank")
    parser.add_argument("--theirs", action="store_true")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
