"""From changes of weights to a new adapter: LoRA ops where a change has factors, dense deltas and biases where it has not.

A bias goes beside the LoRA where the module has one of its own, and into the up projection's bias where it has none: these are the two
ways in which files of the reference library can hold it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.algebra.change import Change
from slimtune.algebra.shorten import Short, shorten
from slimtune.core.errors import CapabilityError, SpecError
from slimtune.core.op import Op
from slimtune.core.placing import base_modules, check_free, install, put_to_use
from slimtune.core.report import Report, make_report
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.files.layouts.patterns import from_key, from_targets, to_pattern, to_targets
from slimtune.methods.bitfit import BitFit
from slimtune.methods.dense import Dense
from slimtune.methods.lora import LoRA

LARGE = 0.1  # relative error from which a report warns: below it, answers hardly differ


@dataclass(frozen=True)
class Outcome(Report):
    """The report of a computed adapter.

    Attributes:
        chosen: weight -> rank of its LoRA.
        errors: weight -> relative Frobenius error of what stands for its change (0: exact).
        error: the same over all weights together.
    """

    chosen: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    @property
    def worst(self) -> float:
        """The largest error of any weight."""
        return max(self.errors.values(), default=0.0)

    def ranks(self) -> dict[str, int]:
        """Return weight -> rank of its LoRA."""
        return self.chosen

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "ranks": self.chosen, "errors": self.errors, "error": self.error}

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.chosen:
            counts = sorted(Counter(self.chosen.values()).items())
            lines.append("  rank: " + ", ".join(f"{r} ({n} weights)" for r, n in counts[:12]) + (", ..." if len(counts) > 12 else ""))
        if self.worst > 0:
            worst = max(self.errors, key=lambda at: self.errors[at])
            lines.append(f"  relative error: {self.error:.2g} over all, at most {self.worst:.2g} ({worst})")
            if self.error > LARGE:
                hint = "a higher rank keeps more (energy=0.95 finds one for each weight)"
                lines.append(f"  warning: {_lost(self.error)} of the change is lost; {hint}")
        elif self.errors:
            lines.append("  exact")
        return "\n".join(lines)


def _lost(error: float) -> str:
    return "most" if error > 0.7 else "about half" if error > 0.4 else "a part"  # of its norm


class Builder:
    """Collects the ops of a new adapter; the model changes only in `finish`.

    Args:
        model: where it goes.
        name: its name.
        dtype: of its parameters, as in `attach`.
        lora: options of its LoRA ops; their rank comes with each change, their scale s is kept. Default: s = 1.
    """

    def __init__(self, model: nn.Module, name: str, dtype: torch.dtype | None, lora: LoRA | None = None) -> None:
        check_free(model, name)
        self.model, self.name, self.dtype = model, name, dtype
        self.options = lora if lora is not None else LoRA(r=1, alpha=1.0)
        self.short: list[tuple[Change, Short]] = []
        self.made: list[tuple[Site, str, Op]] = []
        self.norms: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    # ---- what the adapter holds -----------------------------------------------------------------------------------
    def keep(self, site: Site, key: str, op: Op) -> None:
        """Take an op as it is."""
        self.made.append((site, key, op))

    def low_rank(self, change: Change, short: Short) -> None:
        """Take a change as a LoRA."""
        self.short.append((change, short))
        self.norms[label(change.site)], self.errors[label(change.site)] = short.norm, short.error

    def dense(self, change: Change) -> None:
        """Take a change as a dense delta."""
        op: Any = Dense().make(change.site.for_build(self.dtype, True, {}))
        with torch.no_grad():
            self.norms[label(change.site)] = change.write(op.D)
            if op.d is not None:
                op.d.zero_() if change.bias is None else op.d.copy_(change.bias)
            elif change.bias is not None:
                self.bias(change.site, change.bias)
        self.errors[label(change.site)] = 0.0
        self.made.append((change.site, "", op))

    def bias(self, site: Site, change: Tensor) -> None:
        """Take the change of a bias."""
        op: Any = BitFit(missing="add").make(site.for_build(self.dtype, True, {}))
        with torch.no_grad():
            op.d.copy_(change)
        self.made.append((site, "", op))

    # ---- putting it in --------------------------------------------------------------------------------------------
    def finish(self, spec: Spec | None = None, notes: tuple[str, ...] = ()) -> Outcome:
        """Put the adapter into the model, idle unless it is the first one.

        Args:
            spec: its recipe, where its ops are all of that; default: made from what it holds.
        """
        self._one_rank_each()
        for change, short in self.short:
            self._lora(change, short)
        if spec is None:
            spec = self._spec()
        first = "slim_state" not in self.model.__dict__
        order = {path: i for i, path in enumerate(base_modules(self.model))}
        self.made.sort(key=lambda made: order[made[0].path])
        adapter = install(self.model, self.name, spec, self.made)
        if first:
            put_to_use(self.model, adapter)
        total = math.sqrt(sum(n * n for n in self.norms.values()))
        lost = math.sqrt(sum((self.norms[at] * e) ** 2 for at, e in self.errors.items()))
        report = make_report(self.model, adapter, notes)
        return Outcome(
            **{f.name: getattr(report, f.name) for f in fields(Report)},
            chosen={label(change.site): short.r for change, short in self.short},
            errors=dict(self.errors),
            error=lost / total if total else 0.0,
        )

    def _one_rank_each(self) -> None:
        """Give all projections of one attention module one rank: the reference library's files know no more."""
        ranks: dict[str, int] = {}
        for change, short in self.short:
            ranks[change.site.path] = max(ranks.get(change.site.path, 0), short.r)
        for i, (change, short) in enumerate(self.short):
            if change.site.kind.name == "attention" and short.r < ranks[change.site.path]:
                self.short.pop(i)
                self.short.insert(i, (change, new := shorten(change, ranks[change.site.path], None)))
                self.errors[label(change.site)] = new.error

    def _lora(self, change: Change, short: Short) -> None:
        site = change.site
        inside = change.bias is not None and site.kind.bias(site.module, site.param) is None
        s = self.options.scale(site)  # the options' own, for the rank they would have had there
        options = replace(self.options, r=short.r, alpha=s * self._down(short.r), rank_pattern=None, alpha_pattern=None, up_bias=inside)
        op: Any = options.make(site.for_build(self.dtype, True, {}), 0)
        A, B = site.kind.pack(short.A, short.B / s, site.shape)
        with torch.no_grad():
            op.start_from(A, B, frozen=False)
            if inside:
                op.up_bias.copy_(change.bias / s)  # type: ignore[operator]
        self.made.append((site, "", op))
        if change.bias is not None and not inside:
            self.bias(site, change.bias)

    def _down(self, r: int) -> float:
        return math.sqrt(r) if self.options.rank_stabilised else r

    def _spec(self) -> Spec:
        """Return a recipe that names what the adapter holds."""
        found: dict[str, list[tuple[Site, Any]]] = {}
        for site, _, op in self.made:
            found.setdefault(op.method, []).append((site, op))
        if not found:
            raise CapabilityError(f"{self.name!r} would hold nothing: no weight and no bias changes", hint="look at the weights or at the two models")
        method = next(m for m in ("lora", "dense", "bitfit") if m in found)
        for _, op in found[method]:
            op.part = 0
        where = targets(self.model, {site.path for site, _ in found[method]})
        if method != "lora":
            return Dense(targets=where) if method == "dense" else BitFit(targets=where, missing="add")
        ranks = {site.path: int(op.r) for site, op in found["lora"]}
        alphas = {site.path: op.scale * self._down(op.r) for site, op in found["lora"]}
        r = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas[path] for path in ranks if ranks[path] == r).most_common(1)[0][0]
        spec = replace(
            self.options,
            r=r,
            alpha=alpha,
            rank_pattern={from_key(k): v for k, v in to_pattern(ranks, r).items()} or None,
            alpha_pattern={from_key(k): v for k, v in to_pattern(alphas, alpha).items()} or None,
            targets=where,
        )
        spec.validate()
        wrong = [f"{site}: {problem}" for site, _ in found["lora"] for problem in spec.check(site)]
        if wrong:
            raise SpecError(f"LoRA(...) does not fit {len(wrong)} sites: {'; '.join(wrong[:4])}", where=wrong[0].split(": ")[0], hint="change to=")
        return spec


def label(site: Site) -> str:
    """Return how reports call a weight."""
    return site.path if site.param == "weight" else f"{site.path}.{site.param}"


def targets(model: nn.Module, paths: set[str]) -> str | tuple[str, ...]:
    """Return targets that name just these modules."""
    return from_targets(to_targets(paths, list(base_modules(model)), layers=False)["target_modules"])
