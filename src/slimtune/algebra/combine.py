"""combine, reduce: new adapters from old ones: weighted sums, task arithmetic, pruned merges, lower ranks.

Everything is said of changes of weights, dW and db, so adapters of different methods, ranks, scales and targets go together, and a place that
only some of them have counts too. What comes out is

    an adapter of the same method   where the method's change is linear in what it trains (IA3, biases, norms, dense deltas, MoRA)
    a LoRA                          where the sum has factors, or a rank is asked for; fully trained modules and norms stay dense beside it
    a dense delta                   otherwise

"linear" is the exact sum of the changes. (The reference library's "linear" averages A and B, each by the root of the weights, which is
another map: B_1 A_2 terms appear. Its exact forms are "cat" and "svd".)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimtune.algebra.build import Builder, Outcome, label
from slimtune.algebra.change import Change, added, change_of, check_affine, ops_at, places, site_at
from slimtune.algebra.own import Weighted, closed, combine_closed
from slimtune.algebra.prune import HOWS, MAJORITIES, Pruning
from slimtune.algebra.shorten import as_it_is, check_rule, rank_unit, shorten
from slimtune.core.calls import combining, shows
from slimtune.core.errors import CapabilityError, SpecError, closest
from slimtune.core.state import Adapter, state_of, unwrap

ALL = ("linear", "cat", "svd", *HOWS, *(f"{how}_svd" for how in HOWS))


@shows(combining)
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: str = "linear",
    density: float | None = None,
    r: int | None = None,
    energy: float | None = None,
    dense: bool = False,
    majority: str = "total",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Make a new adapter out of several: sums, differences, multiples, TIES, DARE.

    The plan in force stays as it is; the new adapter is one like any other: use, train, merge, save it. `{"a": 1, "b": -1}` takes a
    task away, `{"a": 0.5}` scales.

    Args:
        model: a model with adapters, nothing merged.
        weights: adapter -> weight, of any sign.
        name: of the new adapter.
        how: "linear": the exact weighted sum, in the smallest form that holds it. "cat": the same as factors side by side (rank: the sum of
            ranks), refused where there are none. "svd": its best approximation of rank r. "ties", "dare_linear", "dare_ties",
            "magnitude_prune": task vectors pruned element by element first (see `algebra.prune`), kept in the adapters' own method where
            that can hold them, else as a LoRA of rank r; with "_svd" behind, always as a LoRA.
        density: for pruning: share of entries that stay, in (0, 1].
        r: for "svd" and pruning: largest rank; default: at each weight the highest rank of the adapters there.
        energy: instead of r: keep this share of |dW|^2 at each weight, by the smallest rank that does.
        dense: keep the exact result as dense deltas, as large as the weights, instead of a LoRA.
        majority: for TIES: how signs are elected: "total" (the larger sum) or "frequency" (the larger number).
        seed: for DARE.
        dtype: of the new parameters, as in `attach`.

    Returns:
        A report with the rank and the relative error of every weight.

    Raises:
        CapabilityError: an adapter is no change of weights (bottleneck, prompts) or no fixed one (DoRA), naming it.
        SpecError: options that do not fit together, or a missing rank.
        NoSuchAdapter, NameInUse, MergeError: as in `attach`.

    Source:
        task arithmetic arXiv 2212.04089, TIES arXiv 2306.01708, DARE arXiv 2311.03099.

    Example:
        >>> import slimtune as st, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> reports = [st.attach(model, st.LoRA(r=r), name=name) for name, r in (("a", 2), ("b", 3))]
        >>> st.combine(model, {"a": 0.5, "b": 0.5}, name="mix").ranks()
        {'0': 5}
    """
    model = unwrap(model)
    weighted = _weighted(model, weights, how)
    pruning = _options(how, density, r, energy, dense, majority, seed)
    builder = Builder(model, name, dtype)
    for adapter, _ in weighted:
        check_affine(adapter, "combined")
        _check_sums(adapter)
    to_lora = how == "cat" or how.endswith("svd") or r is not None or energy is not None
    if not to_lora and not dense and closed(model, weighted):
        spec = combine_closed(model, weighted, builder, pruning)
        return builder.finish(spec)
    for path, param in places(model, [adapter for adapter, _ in weighted]):
        site = site_at(model, path, param)
        terms = [(change_of(site, ops), w, a) for a, w in weighted if (ops := ops_at(a, path, param))]
        total = added([(c, w) for c, w, _ in terms]) if pruning is None else _pruned(terms, pruning)
        if not total.moves:
            if total.bias is not None:
                builder.bias(site, total.bias)
        elif dense or site.kind.rank_problems(site.module, param, rank_unit(total)) or _full(weighted, path, param):
            builder.dense(total)
        elif how in {"linear", "cat"}:
            if total.pair is not None:
                builder.low_rank(total, as_it_is(total))
            elif how == "linear":
                builder.dense(total)
            else:
                raise CapabilityError(
                    "the adapters have no factors here that could stand side by side",
                    where=f"{site}: {', '.join(a.spec.method for *_, a in terms)}",
                    hint='how="svd" with r= finds factors; how="linear" keeps the exact sum',
                )
        else:
            builder.low_rank(total, shorten(total, None if energy is not None else r or _default_rank(terms), energy))
    return builder.finish()


def reduce(
    model: nn.Module, which: str, *, name: str, r: int | None = None, energy: float | None = None, dtype: torch.dtype | None = None
) -> Outcome:
    """Make a LoRA of lower rank out of an adapter: the best one there is, found without any matrix of the weight's size.

    Args:
        model: a model with adapters, nothing merged.
        which: the adapter; of any method that changes weights.
        name: of the new adapter.
        r: its rank.
        energy: instead of r: at each weight the smallest rank that keeps this share of |dW|^2.
        dtype: of its parameters, as in `attach`.

    Returns:
        A report with the rank and the relative error of every weight.

    Raises:
        CapabilityError, SpecError, NoSuchAdapter, NameInUse, MergeError: see `combine`.

    Example:
        >>> st.reduce(model, "support", energy=0.95, name="small").ranks()  # doctest: +SKIP
    """
    if r is None and energy is None:
        raise SpecError("reduce needs the new rank", hint="r=4, or energy=0.95 to have it found for every module")
    return combine(model, {which: 1.0}, how="svd", r=r, energy=energy, name=name, dtype=dtype)


# ---- checks -----------------------------------------------------------------------------------------------------------
def _weighted(model: nn.Module, weights: Mapping[str, float], how: str) -> Weighted:
    if how not in ALL:
        raise SpecError(f"how={how!r} is no way to combine", hint=f"closest: {closest(str(how), ALL)}; all: {', '.join(ALL)}")
    if not isinstance(weights, Mapping) or not weights:
        raise SpecError(f"combine takes a mapping from adapter to weight, not {weights!r}", hint='{"a": 0.5, "b": 0.5}')
    odd = {n: w for n, w in weights.items() if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)}
    if odd:
        raise SpecError(f"weights must be numbers: {odd}", hint='{"a": 0.5, "b": 0.5}')
    state = state_of(model)
    return [(state.adapter(name), float(w)) for name, w in weights.items()]


def _options(
    how: str, density: float | None, r: int | None, energy: float | None, dense: bool, majority: str, seed: int
) -> Pruning | None:
    """Check the options against each other and return how to prune, if at all."""
    check_rule(r, energy)
    base = how.removesuffix("_svd")
    wrong = []
    if base in HOWS:
        if density is None:
            wrong.append(f"how={how!r} needs density=, the share of entries that stay")
        elif isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            wrong.append(f"density must be above 0 and at most 1, not {density!r}")
    elif density is not None:
        wrong.append(f"density= belongs to {', '.join(HOWS)}, not to how={how!r}")
    if how in {"linear", "cat"} and (r is not None or energy is not None):
        wrong.append(f'how={how!r} is exact and takes no rank: use how="svd"')
    if dense and (how == "cat" or how.endswith("svd") or r is not None or energy is not None):
        wrong.append("dense=True keeps the exact result, which has no rank: leave out r= and energy=, and use a how= without svd")
    if majority not in MAJORITIES:
        wrong.append(f"majority must be one of {', '.join(MAJORITIES)}, not {majority!r}")
    if wrong:
        raise SpecError("; ".join(wrong), where="combine(...)", hint='how="ties", density=0.5')
    return Pruning(base, float(density or 1.0), majority, seed) if base in HOWS else None


def _check_sums(adapter: Adapter) -> None:
    for (path, _), op in adapter.ops.items():
        if hasattr(op, "turn"):
            raise CapabilityError(
                f"{adapter.name!r} cannot be combined: {type(op).__name__} transforms the weight it finds, so its change is no fixed summand",
                where=f"{path} (method {op.method})",
                hint=f"convert it first: st.convert(model, {adapter.name!r}, to=st.LoRA(r=...), name=...), or stack it: st.use(model, [...])",
            )


# ---- one weight -------------------------------------------------------------------------------------------------------
def _full(weighted: Weighted, path: str, param: str) -> bool:
    """Tell whether a weight is trained in full beside adapters of another kind (a new head): it stays so."""
    movers = [op for a, _ in weighted for op in ops_at(a, path, param) if hasattr(op, "weight")]
    others = any(op.method != "dense" for a, _ in weighted for op in a.ops.values() if hasattr(op, "weight"))
    return others and all(op.method == "dense" for op in movers)


def _pruned(terms: list[tuple[Change, float, Adapter]], pruning: Pruning) -> Change:
    site = terms[0][0].site
    moving = [(c, w, a) for c, w, a in terms if c.moves]
    biases = [(c.bias, w, f"{a.name} {label(site)} bias") for c, w, a in terms if c.bias is not None]

    def pieces(i: int) -> Tensor:
        return pruning([(c.piece(i), w, f"{a.name} {site.path} {site.param} {i}") for c, w, a in moving])

    return Change(site, pieces=pieces if moving else None, bias=pruning(biases) if biases else None)


def _default_rank(terms: list[tuple[Change, float, Adapter]]) -> int:
    ranks = [c.pair[0].shape[1] * rank_unit(c) for c, _, _ in terms if c.pair is not None]
    if not ranks:
        raise SpecError(
            "no adapter here has a rank that could be kept", where=str(terms[0][0].site), hint="give r= or energy=, or dense=True where it is allowed"
        )
    return max(ranks)
