"""What the output head and the loss keep and need when most tokens carry no label: a SmolLM2 without its blocks, so that nothing else counts.

    python -m benchmarks.head_memory --masked 0.7
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from torch import nn

import slimtune as st
from benchmarks.models import inputs, smollm2
from slimtune.testing.live_bytes import LiveBytes


def run(dtype: str, masked: float, rows: int, tokens: int) -> dict[str, Any]:
    """Return MiB that forward keeps and that forward and backward need at most, plain (what the reference library runs) and lean."""
    base = smollm2(getattr(torch, dtype))
    base.model.layers = nn.ModuleList()  # type: ignore[union-attr]
    base.requires_grad_(False)
    data = inputs("smollm2", base, rows, tokens, masked)
    embeds = base.get_input_embeddings()(data.pop("input_ids")).detach()  # type: ignore[operator]
    found: dict[str, Any] = {}
    grads = {}
    for name in ("plain", "lean"):
        model = copy.deepcopy(base).train()
        if name == "lean":
            st.lean(model)
        x = embeds.clone().requires_grad_()
        with LiveBytes() as live:
            loss = model(inputs_embeds=x, **data).loss
            kept = live.now
            loss.backward()
        grads[name] = x.grad
        found[name] = {"kept_mib": kept / 2**20, "peak_mib": live.peak / 2**20, "loss": float(loss.detach())}
    gap = (grads["plain"] - grads["lean"]).float().norm() / grads["plain"].float().norm()  # type: ignore[operator, union-attr]
    ratio = {k: found["lean"][k] / found["plain"][k] for k in ("kept_mib", "peak_mib")}
    return {"dtype": dtype, "masked": masked, **found, "ratio": ratio, "gradient_differs_by": float(gap)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--masked", type=float, default=0.7)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
