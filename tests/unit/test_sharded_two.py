"""Two processes (gloo) with a part of each tensor: every one of them saves the whole adapter, the same as without sharding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch


def test_adapters_under_both_kinds_of_sharding_are_saved_whole(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script, env = Path(__file__).with_name("sharded_net.py"), {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(port), str(tmp_path)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-4000:]
    want = safetensors.torch.load_file(tmp_path / "plain-0" / "adapter_model.safetensors")
    for rank in range(2):
        for name in ("fsdp1-one", "fsdp1-nested", "fsdp2"):
            found = safetensors.torch.load_file(tmp_path / f"{name}-{rank}" / "adapter_model.safetensors")
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "shard").exists()
