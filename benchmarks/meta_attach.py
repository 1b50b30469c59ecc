"""Attaching LoRA to a 70B-shaped Llama on the meta device: seconds, and bytes of real memory taken.

    python -m benchmarks.meta_attach

Nothing of the model exists but its shapes, and so it is with the adapter: what is measured is the book-keeping of `attach`.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import torch

import slimtune as st
from slimtune.testing.zoo import llama_70b


def main() -> None:
    """Print the figures as JSON."""
    found: dict[str, Any] = {"torch": torch.__version__, "runs": []}
    for _ in range(3):
        model = llama_70b()
        began = time.perf_counter()
        report = st.attach(model, st.LoRA(r=16))
        seconds = time.perf_counter() - began
        st.detach(model, "default")
        tracemalloc.start()
        st.attach(model, st.LoRA(r=16))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found["runs"].append({"seconds": round(seconds, 3), "python_bytes": peak})
        found |= {"sites": len(report.rows), "adapter_parameters": report.trainable, "total": report.total}
        found["real_tensor_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
