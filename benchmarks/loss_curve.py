"""Two hundred steps on real reviews, ours and the reference library's: same weights, same start, same rows in the same order, two losses.

    python -m benchmarks.loss_curve --dtype float32 --steps 200
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.models import SMOLLM2, ours, reference, same_start, smollm2
from slimtune.train.sources import builtin_data


def batches(rows: int, tokens: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of reviews, cut to the same length."""
    from transformers import AutoTokenizer

    from slimtune.train.models import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2).path_or_hub_id)
    lines = (builtin_data()["fine_foods"] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in [tokenizer(json.loads(line)["text"])["input_ids"][:tokens]] if len(i) == tokens]
    return [{"input_ids": (t := torch.tensor([ids[(s * rows + k) % len(ids)] for k in range(rows)])), "labels": t} for s in range(steps)]


def run(dtype: str, steps: int, rows: int, tokens: int, lr: float) -> dict[str, Any]:
    """Return both curves and how far they part."""
    base = smollm2(getattr(torch, dtype))
    torch.manual_seed(0)
    theirs = reference(base)
    mine = ours(base)
    same_start(mine, theirs)
    optimisers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr) for n, m in (("reference", theirs), ("slimtune", mine))}
    curves: dict[str, list[float]] = {"reference": [], "slimtune": []}
    for data in batches(rows, tokens, steps):
        for name, model in (("reference", theirs), ("slimtune", mine)):
            loss = model(**data, use_cache=False).loss
            loss.backward()
            optimisers[name].step()
            optimisers[name].zero_grad(set_to_none=True)
            curves[name].append(float(loss.detach()))
    gaps = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    last = {n: sum(c[-20:]) / len(c[-20:]) for n, c in curves.items()}
    out = {"dtype": dtype, "steps": steps, "rows": rows, "tokens": tokens, "lr": lr, "losses": curves}
    return out | {"largest_gap": max(gaps), "mean_gap": sum(gaps) / len(gaps), "last_20_mean": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4)
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
