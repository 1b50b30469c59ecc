"""NaN and infinity in an adapter: neither written nor, unless asked for, loaded (runs: `end_to_end/test_non_finite_runs.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimtune as st
from slimtune.core.errors import FileError, FormatError
from slimtune.core.finite import is_finite

BAD = [float("nan"), float("inf"), float("-inf")]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def written(folder: Path, spec: st.Spec, bad: float, ours: bool = True) -> str:
    """Write an adapter, put one bad value into one tensor of its file, and return the tensor's name."""
    model = net()
    st.attach(model, spec)
    st.save(model, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].flatten()[0] = bad
    save_file(tensors, path, {"format": "pt"} if not ours else metadata(path))
    return name.removeprefix("base_model.model.")


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return dict(f.metadata())


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("spec", [st.LoRA(r=2), st.DoRA(of=st.LoRA(r=2)), st.LoRA(r=2, train_modules=("2",), targets=("0",))], ids=str)
def test_a_file_with_nan_or_infinity_is_refused_by_the_name_of_the_tensor(spec: st.Spec, bad: float, tmp_path: Path) -> None:
    for ours in (True, False):
        name = written(tmp_path, spec, bad, ours)
        relax = ("checksum", "config") if ours else ()
        model = net()
        with pytest.raises(FormatError, match="NaN or infinity") as found:
            st.load(model, tmp_path, relax=relax)
        assert name in found.value.what
        assert "relax='nonfinite'" in found.value.hint
        assert "slim_state" not in model.__dict__
        report = st.load(model, tmp_path, relax=(*relax, "nonfinite"))
        assert any(name in note for note in report.notes)
        with pytest.raises(FileError, match="holds NaN or infinity, so it is not written"):
            st.save(model, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_what_the_type_here_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = net()
    st.attach(model, st.LoRA(r=2))
    with torch.no_grad():
        next(model.slim_state.adapters["default"].parameters()).fill_(1e30)
    st.save(model, tmp_path)
    with pytest.raises(FormatError, match="NaN or infinity"):
        st.load(net().half(), tmp_path, dtype=torch.float16, relax="base")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float_type_is_looked_at(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3).to(dtype))
    assert not is_finite(torch.tensor([1.0, float("nan")]).to(dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
