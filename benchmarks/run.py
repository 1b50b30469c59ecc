"""Every benchmark, one process each, ours and the reference library side by side: `make bench`, about an hour; `--only NAME` for one of them.

Writes docs/benchmarks/results.json (every raw sample and the environment), README.md (the tables) and the pictures. What was measured before
stays until it is measured again, so one part can be renewed alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import page

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
_STEP = "benchmarks.training_step"
JOBS: dict[str, list[list[str]]] = {
    "steps": [
        [_STEP, "--dtype", "bfloat16", "--dropout", "0.05"],
        [_STEP, "--dtype", "bfloat16"],
        [_STEP, "--dtype", "float32", "--repeats", "3"],
        [_STEP, "--dtype", "float32", "--dropout", "0.05", "--repeats", "3"],
        [_STEP, "--dtype", "bfloat16", "--method", "dora"],
        [_STEP, "--dtype", "bfloat16", "--method", "dora", "--dropout", "0.05", "--repeats", "3"],
        [_STEP, "--dtype", "bfloat16", "--masked", "0.7"],
        [_STEP, "--model", "minilm", "--dtype", "float32", "--rows", "16", "--tokens", "128"],
        [_STEP, "--model", "vit", "--dtype", "float32", "--rows", "8", "--repeats", "5"],
        [_STEP, "--dtype", "bfloat16", "--compile", "whole", "--repeats", "3"],
        [_STEP, "--dtype", "bfloat16", "--compile", "blocks", "--repeats", "3"],
        [_STEP, "--dtype", "bfloat16", "--dropout", "0.05", "--compile", "blocks", "--repeats", "3"],
    ],
    "dora": [["benchmarks.dora_over_lora", "--dtype", d] for d in ("bfloat16", "float32")],
    "levers": [["benchmarks.levers", "--dtype", "bfloat16"]],
    "mixed": [
        ["benchmarks.mixed_batch", "--rows", "16", "--adapters", "16", "--theirs"],
        ["benchmarks.mixed_batch", "--rows", "64", "--adapters", "32", "--theirs"],
        ["benchmarks.mixed_batch", "--rows", "64", "--adapters", "32", "--resident", "32", "100", "1000", "--r", "4"],
    ],
    "many": [["benchmarks.many_adapters", "--adapters", "100", "--theirs", "30"]],
    "decode": [["benchmarks.decode", "--dtype", "bfloat16"], ["benchmarks.decode", "--dtype", "float32"]],
    "trunk": [["benchmarks.trunk", "--dtype", "bfloat16"]],
    "head": [["benchmarks.head_memory", "--masked", "0.7"]],
    "loss": [["benchmarks.loss_curve", "--dtype", "float32", "--steps", "200"]],
    "growth": [["benchmarks.growth"]],
    "combine": [["benchmarks.combine"]],
    "meta": [["benchmarks.meta_attach"]],
    "import": [["benchmarks.import_time"]],
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(JOBS), help="measure only this part again")
    only = parser.parse_args().only or list(JOBS)
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    results["environment"] = environment()
    for name in only:
        found: list[dict[str, Any]] = []
        for job in JOBS[name]:
            found.append(call(*job))
            results[name] = found + results.get(name, [])[len(found) :]  # the old figures stay until the new ones are there
            file.write_text(json.dumps(results, indent=1) + "\n")
        results[name] = found
    print(page.write(results, OUT))


if __name__ == "__main__":
    main()
