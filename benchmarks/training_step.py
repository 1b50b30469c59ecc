"""One training step, ours beside the reference library's: bytes kept, peak bytes, and seconds, in processes that take turns.

    python -m benchmarks.training_step --dtype bfloat16 --dropout 0.05 --method lora
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.models import BASES, inputs, ours, reference
from benchmarks.turns import take_turns
from slimtune.testing.live_bytes import LiveBytes


def stack(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a model."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 3)


def stepper(model: nn.Module, data: dict[str, torch.Tensor], lr: float = 1e-4, compiled: str = "") -> Callable[[], float]:
    """Return a function that does one AdamW step and returns the loss; `compiled`: "", "whole" or "blocks" (each by itself)."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=lr, fused=True)  # as transformers' Trainer does by default
    run: Any = torch.compile(model) if compiled == "whole" else model
    for block in stack(model) if compiled == "blocks" else ():
        block.compile()

    def step() -> float:
        loss = run(**data).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def step_bytes(model: nn.Module, data: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return MiB alive after forward, and the most alive during forward and backward, beyond what was there before."""
    model(**data).loss.backward()  # gradients and caches exist before counting
    gc.collect()
    with LiveBytes() as live:
        loss = model(**data).loss
        kept = live.now
        loss.backward()
    return {"kept_mib": kept / 2**20, "peak_mib": live.peak / 2**20}


def floor_step(base: nn.Module, data: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Return the frozen lower bound: forward and input gradients of the bare model, no weight gradients, the same lean forms.

    The input of the first block is made to ask for a gradient, so every block's input gradient is computed, as with an adapter in each.
    """
    import copy

    import slimtune as st

    model = copy.deepcopy(base).train()
    for p in model.parameters():
        p.requires_grad_(False)
    st.lean(model)
    stack(model)[0].register_forward_pre_hook(lambda module, args: (args[0].detach().requires_grad_(), *args[1:]))

    def step() -> float:
        loss = model(**data).loss
        loss.backward()
        return float(loss.detach())

    return step


def alternate(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return seconds of every step, the contestants taking turns, each round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for name in names:
        steps[name]()  # warm-up
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def contestant(
    who: str, model: str, dtype: str, rows: int, tokens: int, masked: float = 0.0, dropout: float = 0.0, method: str = "lora", compiled: str = ""
) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a step of "reference", "slimtune" or "floor", and the bytes that it keeps and needs at most."""
    base = BASES[model](getattr(torch, dtype))
    data = inputs(model, base, rows, tokens, masked)
    torch.manual_seed(0)
    if who == "floor":
        return floor_step(base, data), {}
    adapted = (ours if who == "slimtune" else reference)(base, dropout=dropout, method=method)
    del base
    found = step_bytes(adapted, data)
    adapted.zero_grad(set_to_none=True)
    return stepper(adapted, data, compiled=compiled), found


def run(model: str, dtype: str, dropout: float, method: str, rows: int, tokens: int, masked: float, repeats: int, compile: str) -> dict[str, Any]:
    """Return every figure of one configuration."""
    shape = {"model": model, "dtype": dtype, "rows": rows, "tokens": tokens, "masked": masked}
    adapted = {**shape, "dropout": dropout, "method": method, "compiled": compile}
    contestants = {who: (contestant, {"who": who, **(shape if who == "floor" else adapted)}) for who in ("reference", "slimtune", "floor")}
    seconds, facts = take_turns(contestants, repeats)
    median = {k: statistics.median(v) for k, v in seconds.items()}
    mine, theirs = facts["slimtune"], facts["reference"]
    ratio = {
        "kept": mine["kept_mib"] / theirs["kept_mib"],
        "peak": mine["peak_mib"] / theirs["peak_mib"],
        "time": statistics.median(a / b for a, b in zip(seconds["slimtune"], seconds["reference"], strict=True)),
        "over_floor": median["slimtune"] / median["floor"],
        "reference_over_floor": median["reference"] / median["floor"],
        "floor": median["floor"] / median["reference"],
    }
    case = {**adapted, "processes": len(contestants)}
    return {"case": case, "bytes": {"reference": theirs, "slimtune": mine}, "seconds": seconds, "median": median, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", choices=list(BASES))
    parser.add_argument("--compile", default="", choices=["", "whole", "blocks"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--method", default="lora", choices=["lora", "dora"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--masked", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(run(**vars(args)), indent=1))


if __name__ == "__main__":
    main()
