"""convert: an adapter of any method that changes weights, as a LoRA (or a dense delta).

    dW = T(W) - W for the whole stack of ops, db likewise;  s B A = the best rank-r approximation of dW (Eckart-Young)

Where dW has factors (LoRA, VeRA, ...) nothing of the weight's size is made; experts are decomposed one at a time. Quantised bases are
dequantised one weight at a time. Cost where there are no factors: one SVD for each weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slimtune.algebra.build import Builder, Outcome, label
from slimtune.algebra.change import change_of, check_affine, ops_at, places, site_at
from slimtune.algebra.shorten import check_rule, rank_unit, shorten
from slimtune.core.errors import CapabilityError, SpecError
from slimtune.core.spec import AUTO, Spec
from slimtune.core.state import state_of, unwrap
from slimtune.methods.dense import Dense
from slimtune.methods.lora import LoRA


def convert(
    model: nn.Module,
    which: str | Sequence[str],
    *,
    name: str,
    to: Spec | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Make a LoRA that does what an adapter of any affine method does, DoRA included.

    The plan in force stays as it is. Biases are carried over; norms and fully trained modules stay dense.

    Args:
        model: a model with adapters, nothing merged.
        which: an adapter, or a list of them: the stack, the first acts first.
        name: of the new adapter.
        to: a LoRA with the rank, scale and dropout wanted (its places come from the adapter); or `Dense()`: exact, as large as the weights.
            Default: `LoRA()`.
        energy: instead of the rank of `to`: at each weight the smallest rank that keeps this share of |dW|^2.
        dtype: of the new parameters, as in `attach`.

    Returns:
        A report with the rank and the relative error |dW - s B A| / |dW| of every weight.

    Raises:
        CapabilityError: the adapter is no change of weights, or changes nothing that has a rank.
        SpecError: `to` is of another method, or says where to go.
        NoSuchAdapter, NameInUse, MergeError: as in `attach`.

    Example:
        >>> import slimtune as st, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = st.attach(model, st.IA3(targets=("0",), feedforward=()), name="ia3")
        >>> st.convert(model, "ia3", to=st.LoRA(r=8), name="as_lora").ranks()
        {'0': 8}
    """
    model = unwrap(model)
    state = state_of(model)
    spec = LoRA() if to is None else to
    check_to(spec, energy)
    names = [which] if isinstance(which, str) else list(which)
    adapters = [state.adapter(n) for n in names]
    if not adapters or len(set(names)) != len(names):
        raise SpecError(f"convert takes an adapter or a stack of different ones, not {which!r}", hint='st.convert(model, "ia3", name="as_lora")')
    for adapter in adapters:
        check_affine(adapter, "converted")
    builder = Builder(model, name, dtype, spec if isinstance(spec, LoRA) else None)
    stay: list[str] = []
    others = any(op.method != "dense" for a in adapters for op in a.ops.values() if hasattr(op, "weight"))
    for path, param in places(model, adapters):
        site = site_at(model, path, param)
        ops = [op for a in adapters for op in ops_at(a, path, param)]
        change = change_of(site, ops)
        if not change.moves:
            if change.bias is not None:
                builder.bias(site, change.bias)
            continue
        full = others and all(op.method == "dense" for op in ops if hasattr(op, "weight"))
        if not isinstance(spec, LoRA):
            builder.dense(change)
        elif full or site.kind.rank_problems(site.module, param, rank_unit(change)):
            builder.dense(change)
            stay.append(label(site))
        else:
            builder.low_rank(change, shorten(change, None if energy is not None else spec.rank(site), energy))
    if isinstance(spec, LoRA) and not builder.short:
        kinds = sorted({op.kind.name for a in adapters for op in a.ops.values()})
        what = "only biases change" if not stay else f"what it changes ({', '.join(kinds)}) is no matrix"
        raise CapabilityError(
            f"{which!r} cannot become a LoRA: {what}",
            where=f"method {', '.join(a.spec.method for a in adapters)}",
            hint="keep it beside LoRAs: st.combine and st.use take them together",
        )
    return builder.finish(notes=(f"kept as dense deltas: {', '.join(stay[:8])}",) if stay else ())


def check_to(spec: Spec, energy: float | None) -> None:
    """Raise unless a recipe can say what to convert to.

    Raises:
        SpecError: naming everything that is wrong.
    """
    if type(spec) not in (LoRA, Dense):  # a method built on LoRA is not one: its ops do more
        what = spec.method if isinstance(spec, Spec) else repr(spec)
        raise SpecError(f"a change of weights converts to a LoRA or to a dense delta, not to {what}", hint="to=st.LoRA(r=8)")
    spec.validate()
    check_rule(None, energy)
    wrong = [f"{f}={getattr(spec, f)!r}" for f in ("layers", "exclude", "train_modules") if getattr(spec, f) not in (None, (), AUTO)]
    if spec.targets != type(spec).targets:
        wrong.insert(0, f"targets={spec.targets!r}")
    if isinstance(spec, LoRA) and spec.up_bias:
        wrong.append("up_bias=True")
    if isinstance(spec, Dense) and energy is not None:
        wrong.append(f"energy={energy} (a dense delta is exact)")
    if wrong:
        raise SpecError(
            f"the new adapter goes where the old one is, biases included: {', '.join(wrong)} has no meaning here", hint="to=st.LoRA(r=8)"
        )
