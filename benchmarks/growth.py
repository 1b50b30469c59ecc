"""How the cost of a step grows: with tokens, rank, adapted modules, depth, and resident adapters.

    python -m benchmarks.growth
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

import slimtune as st
from benchmarks.models import ALL_SEVEN, inputs, smollm2
from benchmarks.training_step import step_bytes, stepper


def cut(base: nn.Module, depth: int) -> nn.Module:
    """Return a copy with the first `depth` blocks only."""
    model = copy.deepcopy(base)
    model.model.layers = model.model.layers[:depth]  # type: ignore[union-attr, index]
    model.config.num_hidden_layers = depth  # type: ignore[union-attr]
    return model


def measured(model: nn.Module, tokens: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step and what forward keeps, MiB."""
    data = inputs("smollm2", model, 1, tokens)
    kept = step_bytes(model, data)["kept_mib"]
    model.zero_grad(set_to_none=True)
    step = stepper(model, data)
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "kept_mib": kept}


def adapted(base: nn.Module, r: int = 16, targets: tuple[str, ...] = ALL_SEVEN, layers: str | None = None) -> nn.Module:
    model = copy.deepcopy(base)
    st.attach(model, st.LoRA(r=r, alpha=2 * r, targets=targets, layers=layers))
    st.lean(model)
    return model.train()


def resident(base: nn.Module, counts: list[int], repeats: int) -> list[dict[str, float]]:
    """Return the cost of a training step under one adapter among n (rank 1, so that a thousand of them fit)."""
    model = copy.deepcopy(base)
    found, there = [], 0
    for n in counts:
        start = time.perf_counter()
        for i in range(there, n):
            st.attach(model, st.LoRA(r=1, targets=("q_proj", "v_proj")), name=f"a{i}")
        attach = (time.perf_counter() - start) / (n - there)
        there = n
        st.use(model, "a0")
        found.append({"x": n, "attach_seconds": attach, **measured(model.train(), 128, repeats)})
    return found


def run(repeats: int) -> dict[str, Any]:
    """Return every curve: a list of {x, seconds, kept_mib}."""
    base = smollm2(torch.bfloat16)
    curves: dict[str, Any] = {}
    model = adapted(base)
    curves["tokens per step"] = [{"x": n, **measured(model, n, repeats)} for n in (64, 128, 256, 512, 1024)]
    curves["rank"] = [{"x": r, **measured(adapted(base, r), 256, repeats)} for r in (4, 16, 64, 128, 256)]
    subsets = [ALL_SEVEN[:k] for k in (1, 2, 3, 4, 5, 6, 7)]
    curves["adapted modules"] = [{"x": 30 * len(s), **measured(adapted(base, targets=s), 256, repeats)} for s in subsets]
    curves["depth"] = [{"x": d, **measured(adapted(cut(base, d)), 256, repeats)} for d in (5, 10, 15, 20, 25, 30)]
    curves["resident adapters"] = resident(base, [1, 10, 100, 1000], repeats)
    return {"curves": curves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
