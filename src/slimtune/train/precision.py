"""In which numbers the frozen weights are kept and multiplied: bfloat16 where it is fast, 4 or 8 bits where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimtune.core.errors import RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_dtype(name: str = "auto") -> torch.dtype:
    """Return the dtype a recipe names; "auto" is bfloat16 where the GPU or CPU multiplies it fast, else float32."""
    if name != "auto":
        return DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.backends.mps.is_available():
        return torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # torch >= 2.9
        found = torch.cpu.get_capabilities()
        if found.get("architecture") == "x86_64":
            return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's name


def device() -> str:
    """Return the device of this process."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def quantization(name: str, dtype: torch.dtype) -> Any:
    """Return transformers' configuration for a quantised base.

    Args:
        name: "nf4" or "int8".
        dtype: of the products.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise RecipeError(f"quantize: {name} needs bitsandbytes", hint="pip install 'slimtune[quant]', or quantize: none") from None
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **kind)  # type: ignore[no-untyped-call]
