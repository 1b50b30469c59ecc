"""Freed memory stays with the process while a model is lean, and goes back afterwards."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from slimtune.savers.heap import _CHOSEN, give_back, keep_freed

CYCLES = """
import json, resource, torch
from slimtune.savers.heap import give_back, keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(2**20) for _ in range(32)]  # 128 MiB, all of them freed again
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

assert keep_freed() == ""
faults()
kept, held = faults(), resident()
give_back()
print(json.dumps([kept, held, resident(), faults()]))
"""


def test_pages_are_taken_once() -> None:
    if platform.libc_ver()[0] != "glibc":  # it is glibc that gives memory back; elsewhere the reason is told
        assert keep_freed() == "C's library is not glibc"
        return
    env = {k: v for k, v in os.environ.items() if k not in _CHOSEN}
    done = subprocess.run([sys.executable, "-c", CYCLES], capture_output=True, text=True, env=env, check=True)
    kept, held, after, again = json.loads(done.stdout)
    assert kept < 1_000  # 128 MiB are 32,768 pages, five times over
    assert held - after > 20_000
    assert again > 20_000


def test_what_the_environment_chooses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert "MALLOC_TRIM_THRESHOLD_" in keep_freed()
    give_back()
