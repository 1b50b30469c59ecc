"""One of two gloo processes: an adapter trains under FSDP1 or FSDP2, and is saved whole by every process.

python sharded_net.py RANK PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import slimtune as st
from slimtune.testing.subject import fill


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 4)))


def adapted() -> nn.Sequential:
    model = net()
    st.attach(model, st.LoRA(r=2, targets=("0", "1.0")))
    fill(model, "default")
    return model


def step(model: nn.Module) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
    optimiser.step()


def main(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    plain = adapted()
    step(plain)
    st.save(plain, folder / f"plain-{rank}")
    for how in ("one", "nested"):
        model = adapted()
        if how == "nested":
            model[1] = FullyShardedDataParallel(model[1], use_orig_params=True, device_id=torch.device("cpu"))
        wrapper = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        step(wrapper)
        st.save(wrapper, folder / f"fsdp1-{how}-{rank}")
        for verb, wrong in ((lambda m: st.save(m, folder / "shard"), model), (st.merge, wrapper), (lambda m: st.use(m, None), wrapper)):
            with pytest.raises(st.SlimtuneError, match="FullyShardedDataParallel") as found:
                verb(wrong)
            assert "st.save(" in found.value.hint
    model = adapted()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model)
    st.save(model, folder / f"fsdp2-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
