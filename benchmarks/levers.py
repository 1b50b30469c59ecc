"""What each lever of `st.lean` is worth: a training step with all of them, without one at a time, and the products alone that nobody can avoid.

    python -m benchmarks.levers --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models import inputs, ours, smollm2
from benchmarks.training_step import alternate, step_bytes, stepper
from slimtune.core.mixing import generalise
from slimtune.methods import lora
from slimtune.ports import linear
from slimtune.savers.attention import plain_attention
from slimtune.savers.head import LeanHead, LeanLoss
from slimtune.savers.mlp import LeanGatedMLP
from slimtune.savers.norms import LeanRMSNorm

Step = Callable[[], float]


def without(model: nn.Module, *mixins: type) -> None:
    """Take lean forms off again."""
    for module in model.modules():
        for mixin in mixins:
            if issubclass(type(module), mixin):
                generalise(module, mixin)


LEVERS: dict[str, Callable[[nn.Module], None]] = {
    "RMSNorm": lambda m: without(m, LeanRMSNorm),
    "gated feed-forward": lambda m: without(m, LeanGatedMLP),
    "loss head": lambda m: without(m, LeanHead, LeanLoss),
    "attention": plain_attention,
}


def unfused(call: Step) -> Step:
    """Return a step whose low-rank products run in plain autograd."""

    def step() -> float:
        kept = linear.fusing, lora.fusing
        linear.fusing = lora.fusing = lambda t: False
        try:
            return call()
        finally:
            linear.fusing, lora.fusing = kept

    return step


def products(base: nn.Module, rows: int, supervised: int) -> tuple[Step, int]:
    """Return a function that multiplies with every frozen weight, forward and for the gradient of its input, and how many FLOPs that is."""
    maps = [(m.weight, rows) for m in base.model.layers.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    maps.append((base.get_output_embeddings().weight, supervised))  # type: ignore[operator]
    data = {(w.shape[i], n): torch.randn(n, w.shape[i], dtype=w.dtype) for w, n in maps for i in (0, 1)}

    def step() -> float:
        with torch.no_grad():
            for w, n in maps:
                F.linear(data[w.shape[1], n], w)  # [n, a] @ [a, b]
                torch.mm(data[w.shape[0], n], w)  # [n, b] @ [b, a]
        return 0.0

    return step, sum(4 * w.numel() * n for w, n in maps)


def run(dtype: str, repeats: int) -> dict[str, Any]:
    """Return seconds and bytes of every variant."""
    base = smollm2(getattr(torch, dtype))
    data = inputs("smollm2", base, 4, 256)
    steps: dict[str, Step] = {}
    kept: dict[str, float] = {}
    for name in ("all", *LEVERS, "fused low-rank product", "everything"):
        model = ours(base, lean=name != "everything")
        if name in LEVERS:
            LEVERS[name](model)
        plain = name in ("fused low-rank product", "everything")
        step = stepper(model, data)
        steps[name] = unfused(step) if plain else step
        measure = lambda m=model: step_bytes(m, data)["kept_mib"]  # noqa: E731
        kept[name] = unfused(measure)() if plain else measure()
        model.zero_grad(set_to_none=True)
    steps["products alone"], flops = products(base, 4 * 256, 4 * 255)
    seconds = alternate(steps, repeats)
    median = {k: statistics.median(v) for k, v in seconds.items()}
    return {"dtype": dtype, "seconds": seconds, "median": median, "kept_mib": kept, "products_flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
