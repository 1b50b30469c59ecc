"""FSDP2 (`fully_shard`): adapters act, are gathered when saved, and leave the classes as fully_shard made them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import slimtune as st


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("first", [True, False])
def test_sharded_adapters_are_saved_whole(mesh: Any, tmp_path: Path, first: bool) -> None:
    plain, x = net(), torch.randn(2, 4)
    st.attach(plain, st.LoRA(r=2, targets=("0", "1.0")))
    for p in plain.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    want = plain(x)
    st.save(plain, tmp_path / "a")

    model = net()
    if first:
        st.load(model, tmp_path / "a", trainable=True)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not first:
        st.load(model, tmp_path / "a", trainable=True)
    st.save(model, tmp_path / "b")  # sharded
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    files = [(tmp_path / at / "adapter_model.safetensors").read_bytes() for at in "ab"]
    assert files[0] == files[1]
    st.detach(model, "default")
    torch.testing.assert_close(model(x), net()(x))
    assert isinstance(model, FSDPModule)
    assert not any(hasattr(type(m), "slim_mixins") for m in model.modules())
