"""What many adapters on one model cost: attaching, saving, loading, switching, and lying idle.

    python -m benchmarks.many_adapters --adapters 100
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slimtune as st
from benchmarks.models import ALL_SEVEN, smollm2
from benchmarks.training_step import alternate


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def idle_cost(model: Any, ids: torch.Tensor, bare: Any, repeats: int) -> dict[str, Any]:
    """Return the seconds of a forward under one adapter where it is alone and where all others lie idle beside it."""

    def forward(which: Any) -> Callable[[], float]:
        def step() -> float:
            with torch.no_grad():
                which(input_ids=ids, use_cache=False)
            return 0.0

        return step

    seconds = alternate({"alone": forward(bare), "among": forward(model)}, repeats)
    return {"seconds": seconds, "ratio": statistics.median(a / b for a, b in zip(seconds["among"], seconds["alone"], strict=True))}


def run(adapters: int, repeats: int, theirs: int) -> dict[str, Any]:
    """Return every figure."""
    model = smollm2(torch.bfloat16).eval()
    spec = st.LoRA(r=16, targets=ALL_SEVEN)
    attach = [timed(lambda i=i: st.attach(model, spec, name=f"a{i}")) for i in range(adapters)]  # type: ignore[misc]
    switch = [timed(lambda i=i: st.use(model, f"a{i * 7 % adapters}")) for i in range(200)]  # type: ignore[misc]
    out: dict[str, Any] = {"adapters": adapters}
    with tempfile.TemporaryDirectory() as folder:
        st.save(model, Path(folder) / "a0", name="a0")
        fresh = smollm2(torch.bfloat16).eval()
        load = [timed(lambda i=i: st.load(fresh, Path(folder) / "a0", name=f"b{i}")) for i in range(adapters)]  # type: ignore[misc]
        alone = smollm2(torch.bfloat16).eval()
        st.load(alone, Path(folder) / "a0", name="b0")
    st.use(fresh, "b0")
    st.use(alone, "b0")
    ids = torch.randint(5, 20_000, (4, 64), generator=torch.Generator().manual_seed(0))
    late = slice(-10, None)
    early = slice(1, 11)  # the very first one also warms caches of torch and of the file system
    out |= {
        "attach": attach, "attach_ratio": statistics.median(attach[late]) / statistics.median(attach[early]),
        "load": load, "load_all_seconds": sum(load), "load_ratio": statistics.median(load[late]) / statistics.median(load[early]),
        "switch_seconds": statistics.median(switch), "idle": idle_cost(fresh, ids, alone, repeats),
    }  # fmt: skip
    if theirs:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, target_modules=list(ALL_SEVEN))
        other = get_peft_model(smollm2(torch.bfloat16), config, adapter_name="a0")
        their_attach = [timed(lambda i=i: other.add_adapter(f"a{i}", config)) for i in range(1, theirs)]  # type: ignore[misc]
        their_switch = [timed(lambda i=i: other.set_adapter(f"a{i * 7 % theirs}")) for i in range(20)]  # type: ignore[misc]
        few = statistics.median(their_attach[1:5])
        out["reference"] = {
            "adapters": theirs, "attach": their_attach, "attach_ratio": statistics.median(their_attach[-4:]) / few,
            "switch_seconds": statistics.median(their_switch),
        }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--theirs", type=int, default=0, help="attach and switch this many with the reference library too")
    print(json.dumps(run(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
