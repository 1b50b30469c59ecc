"""Every benchmark, one process each, ours and the reference library side by side: `make bench`.

Writes docs/benchmarks/results.json (every raw sample and the environment) and docs/benchmarks/README.md (the table).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
STEPS = [
    ("bfloat16", 0.05, "lora", 0.0),
    ("bfloat16", 0.0, "lora", 0.0),
    ("float32", 0.0, "lora", 0.0),
    ("bfloat16", 0.0, "dora", 0.0),
    ("bfloat16", 0.0, "lora", 0.7),
]
COLUMNS = (
    "dtype", "method", "dropout", "labels masked", "kept, peft", "kept, slimtune", "ratio", "peak ratio", "step, peft", "step, slimtune", "ratio",
    "over the floor",
)  # fmt: skip
MIXED = [(16, 16), (64, 32)]


def call(module: str, *args: str) -> dict[str, Any]:
    """Return what one benchmark prints, run in a process of its own."""
    print(f"running {module} {' '.join(args)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", module, *args], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = ("torch", "transformers", "peft")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{p: version(p) for p in packages},
    }


def table(steps: list[dict[str, Any]], mixed: list[dict[str, Any]], env: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "# Beside the reference library",
        "",
        "Made by `make bench`. SmolLM2-135M with its real weights, LoRA or DoRA r=16 on all seven projections, AdamW, 4 x 256 tokens.",
        "Bytes are exact (every storage counted when it is made and when it goes); seconds are medians of alternating steps in one",
        "process, with every raw sample in",
        f"`results.json`. {', '.join(f'{k} {v}' for k, v in env.items())}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for s in steps:
        c, b, r, m = s["case"], s["bytes"], s["ratio"], s["median"]
        kept = [f"{b[who]['kept_mib']:.0f} MiB" for who in ("reference", "slimtune")]
        lines.append(
            f"| {c['dtype']} | {c['method']} | {c['dropout']} | {c['masked']:.0%} | {kept[0]} | {kept[1]} "
            f"| {r['kept']:.2f} | {r['peak']:.2f} | {m['reference']:.2f} s | {m['slimtune']:.2f} s | {r['time']:.2f} | {r['over_floor']:.2f} |"
        )
    lines += [
        "",
        "The floor is forward plus input gradients of the bare model in the same lean forms, measured in the same run.",
        "",
        "| mixed batch, 1 token a row | over the base, slimtune | over the base, peft | times faster | switch adapters |",
        "|---|---|---|---|---|",
    ]
    for x in mixed:
        lines.append(
            f"| {x['rows']} rows, {x['adapters']} adapters | {x['mixed_over_base']:.2f} | {x['reference_over_base']:.1f} | {x['times_faster']:.1f} "
            f"| {x['switch_seconds'] * 1e3:.1f} ms |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    steps = [
        call("benchmarks.training_step", "--dtype", d, "--dropout", str(p), "--method", m, "--masked", str(k), "--repeats", "5")
        for d, p, m, k in STEPS
    ]
    mixed = [call("benchmarks.mixed_batch", "--rows", str(r), "--adapters", str(a), "--theirs") for r, a in MIXED]
    env = environment()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "results.json").write_text(json.dumps({"environment": env, "steps": steps, "mixed": mixed}, indent=1) + "\n")
    text = table(steps, mixed, env)
    (OUT / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
