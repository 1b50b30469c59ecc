"""The property of algebra: what can be merged can be added up and converted, exactly; what cannot is refused with its reason."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.algebra.change import site_at
from slimtune.algebra.merged_values import merged_sites, merged_values
from slimtune.core.errors import CapabilityError
from slimtune.core.plan import Plan, Which
from slimtune.core.site import Site
from slimtune.testing.properties import prop
from slimtune.testing.subject import Subject, adapter_of, close, refused

SUM = {"a": 0.5, "b": -0.7}
Values = dict[tuple[str, str], tuple[Tensor | None, Tensor | None]]


@prop("algebra")
def algebra(s: Subject) -> None:
    """combine gives the weighted sum, convert the adapter itself, as new adapters that run, merge and go to files and back."""
    model = s.attached("a", "b")
    if not s.can_merge(model):
        with refused(CapabilityError, what="combining a method without exact weights", place=True):
            st.combine(model, SUM, name="c")
        with refused(CapabilityError, what="converting a method without exact weights", place=True):
            st.convert(model, "a", name="c")
        return
    if s.can_sum(model):
        st.combine(model, SUM, name="c")
        _same_map(s, model, SUM, "c", "combine")
    else:
        with refused(CapabilityError, what="combining a method that transforms the weight it finds", place=True):
            st.combine(model, SUM, name="c")
    st.convert(model, "a", to=st.Dense(), name="d")
    _same_map(s, model, "a", "d", "convert to a dense delta")
    if not any(site.kind.rank_problems(site.module, site.param, site.shape[0]) == [] for site in _moved(model)):
        with refused(CapabilityError, what="converting what has no rank to a LoRA", place=True):
            st.convert(model, "a", name="e")
        return
    report = st.convert(model, "a", to=st.LoRA(), energy=1.0, name="e")
    assert report.worst < 1e-3 if s.case.dtype == torch.float32 else report.worst < 1e-7, f"full rank, and an error of {report.worst:g}"
    _same_map(s, model, "a", "e", "convert to a LoRA of full rank")


def _same_map(s: Subject, model: nn.Module, which: Which, name: str, what: str) -> None:
    """Assert that an adapter changes the weights as a plan does, and survives a file."""
    wanted = _values(model, which)
    got = _values(model, name)
    bare = s.case.build()
    for key, pair in wanted.items():
        base = bare.get_submodule(key[0])
        slot = model.get_submodule(key[0])._modules["slim"]
        assert slot is not None, f"{what}: nothing at {key}"
        kind = slot.kind
        own: tuple[Tensor | None, Tensor | None] = kind.read(base, key[1]), kind.bias(base, key[1])  # type: ignore[union-attr, operator]
        for value, other, start in zip(pair, got.get(key, (None, None)), own, strict=True):
            value, other = (start if t is None else t for t in (value, other))
            if value is None or other is None:
                left = value if other is None else other
                assert left is None or not bool(left.any()), f"{what}: {key} has no bias"
            else:
                close(other, value, f"{what}: {key}", max(s.case.rtol, 1e-9))
    if s.case.quantised:  # its own rounding of activations would stand between the two outputs
        return
    with st.use(model, which):
        want = s.out(model)
    with st.use(model, name):
        out = s.out(model)
    s.close(out, want, f"{what}: output")
    with tempfile.TemporaryDirectory() as folder:
        st.save(model, Path(folder) / "x", name=name)
        twin = s.case.build()
        st.load(twin, Path(folder) / "x", dtype=s.case.dtype)
        s.close(s.out(twin), out, f"{what}: saved and loaded", 1e-9 if s.case.dtype == torch.float64 else 1e-5)


def _moved(model: nn.Module) -> list[Site]:
    """Return the weights that adapter "a" changes and `convert` is asked to turn into a LoRA."""
    ops = {at: op for at, op in adapter_of(model, "a").ops.items() if hasattr(op, "weight")}
    rest = {at: op for at, op in ops.items() if op.method != "dense"}  # modules trained in full beside something else stay as they are
    return [site_at(model, path, op.param) for (path, _), op in (rest or ops).items()]


def _values(model: nn.Module, which: Which) -> Values:
    """Return the weights and biases that a plan makes."""
    links = Plan.of(which).segments[0][1]
    paths = {id(m): path for path, m in model.named_modules()}
    return {(paths[id(module)], param): merged_values(module, param, chain) for module, param, chain in merged_sites(model, links)}
