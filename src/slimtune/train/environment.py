"""What a run ran on: Python, platform, threads, devices and package versions; no user names, no paths."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from slimtune.version import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "datasets", "numpy", "bitsandbytes")


def environment() -> dict[str, Any]:
    """What the run ran on: Python, platform, threads, devices and package versions; no user names, no paths."""
    import torch

    versions = {"slimtune": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "devices": cuda or ["cpu"],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions,
    }


def _processor() -> str:
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
