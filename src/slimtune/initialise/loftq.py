"""LoftQ: on a quantised base, s B A starts as the best rank-r part of what quantisation lost, W - dequantised(Q(W)).

Paper: arXiv 2310.08659, its step for a given Q (the base here stays as it was quantised). This is the one initialiser that changes the output on
purpose: the adapted model starts nearer to the unquantised one. W is read from the unquantised model's safetensors, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimtune.initialise.free import initialiser
from slimtune.initialise.spectral import balanced, fits_rank, start_matrices

if TYPE_CHECKING:
    from slimtune.core.site import Site
    from slimtune.methods.lora import LoRAOp


def has_source(site: Site, spec: Any) -> list[str]:
    """Return what stops LoftQ at a site: a base that is not quantised, or no original weight of the right shape."""
    if not site.kind.quantised:
        return ['init="loftq" makes up for quantisation, but this layer is not quantised: use another init']
    folder = Path(spec.loftq_source)
    if not folder.is_dir():
        return [f"loftq_source={spec.loftq_source!r} is no folder"]
    wanted = f"{site.path}.weight" if site.path else "weight"
    found = find(folder, wanted)
    if found is None:
        return [f"loftq_source={spec.loftq_source!r} has no tensor {wanted!r} in its *.safetensors"]
    if found[2] != site.shape:
        return [f"loftq_source={spec.loftq_source!r} has {found[1]!r} of shape {list(found[2])}, not {list(site.shape)}"]
    return fits_rank(site, spec)


def find(folder: Path, name: str) -> tuple[Path, str, tuple[int, ...]] | None:
    """Return (file, key, shape) of a tensor: the exact name, else the only one whose end it is or that is its own end."""
    index = _index(folder)
    if name in index:
        return index[name]
    ends = [key for key in index if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return index[ends[0]] if len(ends) == 1 else None


_INDEXES: dict[tuple[tuple[str, int], ...], dict[str, tuple[Path, str, tuple[int, ...]]]] = {}


def _index(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Return name -> (file, name, shape) of every tensor in a folder; only headers are read, and once."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    key = tuple((str(f.resolve()), f.stat().st_mtime_ns) for f in files)
    if key not in _INDEXES:
        found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for file in files:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  (no mapping)
                    found[name] = (file, name, tuple(f.get_slice(name).get_shape()))
        _INDEXES.clear()
        _INDEXES[key] = found
    return _INDEXES[key]


@initialiser("loftq", check=has_source)
def loftq(op: LoRAOp, site: Site, spec: Any) -> None:
    """The best rank-r part of the quantisation error."""
    from safetensors import safe_open

    found = find(Path(spec.loftq_source), f"{site.path}.weight" if site.path else "weight")
    assert found is not None, "has_source has checked it"
    file, key, _ = found
    base = site.read()
    with safe_open(file, framework="pt", device=str(base.device)) as f:
        lost = f.get_tensor(key).to(base.dtype) - base

    def top(M: Tensor, q: int) -> tuple[Tensor, Tensor]:
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        return balanced(U[:, :q], S[:q], V[:q], op.scale)

    start_matrices(op, site, lost, top, frozen=False)
