"""Methods that act at optimiser steps under DistributedDataParallel: every process decides alike, and as one process on all rows does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slimtune as st
from slimtune.core.errors import CapabilityError
from slimtune.core.state import state_of

ADA = st.AdaLoRA(init_r=6, target_r=2, total_steps=14, t_init=1, t_final=4, delta_t=2)
DELTA = st.DeltaLoRA(r=3, start=5)


def net(spec: st.Spec) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    st.attach(model, spec)
    return model


def train(model: Any, rows: slice) -> list[torch.Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for i in range(14):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        model(x[rows]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return [p.detach() for op in state_of(inner).adapters["default"].ops.values() for p in op.parameters()]


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {spec.method: train(DistributedDataParallel(net(spec)), slice(4 * rank, 4 * rank + 4)) for spec in (ADA, DELTA)}
    try:
        train(DistributedDataParallel(net(st.ProgressiveLoRA(every=2))), slice(0, 4))
    except CapabilityError as error:
        found["refused"] = str(error)  # type: ignore[assignment]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{i}.pt") for i in (0, 1))
    for spec in (ADA, DELTA):
        alone = train(net(spec), slice(0, 8))
        for mine, theirs, one in zip(a[spec.method], b[spec.method], alone, strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, one, rtol=1e-7, atol=1e-9)
            assert torch.equal(mine == 0, one == 0)
    assert "a rank cannot change while several processes train" in a["refused"]
    assert "hint" in b["refused"]
