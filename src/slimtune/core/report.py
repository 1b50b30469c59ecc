"""Report: what was adapted, what was not, and what it costs. `attach` returns one; `print` shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from slimtune.core import reach, task_head
from slimtune.core.errors import ReportError, closest
from slimtune.core.state import Adapter

# What people ask of models that nn.Module does not have.
_OF_MODELS = {
    "generate", "config", "generation_config", "device", "dtype", "save_pretrained", "push_to_hub", "print_trainable_parameters",
    "merge_and_unload", "set_adapter", "disable_adapter", "get_base_model", "base_model", "gradient_checkpointing_enable",
    "enable_input_require_grads", "tie_weights", "resize_token_embeddings", "hf_device_map", "training",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One op: where it is and what it holds; `rank` of ops whose rank changes while they train (`Op.rank_now`)."""

    path: str
    module: str
    port: str
    param: str
    shape: tuple[int, ...]
    trainable: int
    total: int
    rank: int | None = None


@dataclass(frozen=True)
class Report:
    """What one adapter covers.

    Attributes:
        name, method: of the adapter.
        rows: one for each op.
        left: class name and weight shape -> number of modules with a weight that this adapter does not touch.
        trainable, total: parameters that train; all parameters of base and adapter.
        bytes: of the adapter's own tensors.
        base_bytes: of the base's parameters.
        notes: remarks worth reading.
    """

    name: str
    method: str
    rows: list[Row]
    left: dict[str, int]
    trainable: int
    total: int
    bytes: int
    base_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trainable share of all parameters, in percent."""
        return 100.0 * self.trainable / max(self.total, 1)

    def ranks(self) -> dict[str, int]:
        """Return module path -> present rank, of ops whose rank changes while they train."""
        return {r.path if r.param == "weight" else f"{r.path}.{r.param}": r.rank for r in self.rows if r.rank is not None}

    def groups(self) -> dict[str, list[Row]]:
        """Return the rows grouped by the path with its block numbers taken out."""
        out: dict[str, list[Row]] = {}
        for row in self.rows:
            key = ".".join("*" if part.isdigit() else part for part in row.path.split(".")) or "(the model)"
            out.setdefault(key if row.param == "weight" else f"{key}.{row.param}", []).append(row)
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._no_model("called like")

    def __getattr__(self, name: str) -> Any:
        """Say what a report is, where it is taken for its model (`model = st.attach(model, ...)`).

        Raises:
            ReportError: always.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        known = [f.name for f in fields(self)]
        if hasattr(nn.Module, name) or name in _OF_MODELS:
            raise self._no_model(f"asked for .{name} of")
        raise ReportError(f"a report has no {name!r}", where="Report", hint=f"closest: {closest(name, known)}")

    def _no_model(self, done: str) -> ReportError:
        return ReportError(
            f"this is a report, {done} a model: attach and load change the model that they are given, and return what they did",
            where=f"the report of adapter {self.__dict__.get('name')!r}",
            hint="st.attach(model, ...) without `model =` in front of it, then model(...) as before",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a JSON-ready dict."""
        return {
            "name": self.name, "method": self.method, "sites": len(self.rows), "trainable": self.trainable, "total": self.total,
            "percent": self.percent, "bytes": self.bytes, "base_bytes": self.base_bytes, "left": self.left, "notes": self.notes,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [
            f"adapter {self.name!r} ({self.method}): {self.trainable:,} of {self.total:,} parameters train ({self.percent:.3f} %), "
            f"{self.bytes / 2**20:.2f} MiB beside {self.base_bytes / 2**20:.1f} MiB"
        ]
        for key, rows in self.groups().items():
            shape = "x".join(map(str, rows[0].shape))
            ranks = [str(r.rank) for r in rows if r.rank is not None]
            now = f"  rank {' '.join(ranks)}" if ranks else ""
            lines.append(f"  {len(rows):4d} x {key:<48} {rows[0].module} {shape}  {sum(r.total for r in rows):,} parameters{now}")
        if self.left:
            lines.append("  not adapted: " + ", ".join(f"{n} x {what}" for what, n in self.left.items()))
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def make_report(model: nn.Module, adapter: Adapter, notes: Iterable[str] = ()) -> Report:
    """Return the report of one adapter, without looking at any other."""
    from slimtune.core.placing import base_modules, kind_at
    from slimtune.core.still import note
    from slimtune.core.targets import candidates

    rows, covered = [], set()
    own: dict[int, Tensor] = {}
    for (path, _), op in adapter.ops.items():
        covered.add(path)
        params = [p for p in op.parameters() if id(p) not in own]  # what several ops share is counted where it is first
        live = sum(p.numel() for p in params if p.requires_grad)
        rank = op.rank_now() if hasattr(op, "rank_now") else None  # type: ignore[operator]
        rows.append(Row(path, base_name(model.get_submodule(path)), op.port, op.param, op.shape, live, sum(p.numel() for p in params), rank))
        own.update({id(t): t for t in (*params, *op.buffers())})
    left: dict[str, int] = {}
    experts = False
    modules = base_modules(model)
    for path, module in candidates(model, modules).items():
        kind = kind_at(module)
        if path in covered or not kind.params or not kind.names(module):
            continue
        experts = experts or kind.name == "experts"
        key = f"{base_name(module)} {'x'.join(map(str, kind.shape(module, kind.names(module)[0])))}"
        left[key] = left.get(key, 0) + 1
    base = {id(p): (p, module) for module in modules.values() for p in module._parameters.values() if p is not None}
    weights = any(op.port == "weight" for op in adapter.ops.values())
    advice = ['3-D expert weights are not adapted: add "experts" to targets'] if experts and weights else []
    still = [path for (path, _), op in adapter.ops.items() if isinstance(s := getattr(op, "scale", None), (int, float)) and s == 0]
    if still:
        advice.append(f"the scale of {len(still)} ops is 0 (alpha=0), so they change nothing and learn nothing: {', '.join(still[:3])}")
    advice += task_head.said(model, adapter)
    advice += reach.said(model, covered)
    return Report(
        name=adapter.name,
        method=adapter.spec.method,
        rows=rows,
        left=left,
        trainable=sum(r.trainable for r in rows),
        total=sum(true_numel(p, module) for p, module in base.values()) + sum(r.total for r in rows),
        bytes=sum(t.numel() * t.element_size() for t in own.values()),
        base_bytes=sum(p.numel() * p.element_size() for p, _ in base.values()),
        notes=[*advice, *note(modules), *(n for part in adapter.spec.parts() if hasattr(part, "remarks") for n in part.remarks(adapter)), *notes],
    )


def base_name(module: nn.Module) -> str:
    return type(module).__name__


def true_numel(p: nn.Parameter, module: nn.Module) -> int:
    """Return the number of weights that a parameter of `module` stands for (a packed 4-bit one holds two in each byte)."""
    from slimtune.core.placing import kind_at

    kind = kind_at(module) if not p.is_floating_point() else None
    return math.prod(kind.shape(module, "weight")) if kind is not None and kind.quantised else p.numel()
