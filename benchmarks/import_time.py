"""What importing costs over torch alone: the lazy names, all of them, and the reference library; processor seconds of fresh processes.

    python -m benchmarks.import_time
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

PROGRAMS = {
    "torch": "import torch",
    "slimtune": "import torch, slimtune",
    "slimtune, every name": "import torch, slimtune as st; [getattr(st, name) for name in dir(st)]",
    "reference": "import torch, peft",
}


def seconds(program: str) -> float:
    """Return the processor time of one process that runs this program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    samples: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(repeats):  # in turns, so that a slow phase of the machine meets all of them
        for name, program in PROGRAMS.items():
            samples[name].append(seconds(program))
    median = {name: statistics.median(s) for name, s in samples.items()}
    over = {name: median[name] - median["torch"] for name in PROGRAMS if name != "torch"}
    print(json.dumps({"seconds_over_torch": over, "median": median, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
