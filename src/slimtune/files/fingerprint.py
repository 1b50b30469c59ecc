"""Fingerprint of a base model: what tells it from another one, whatever its dtype, quantisation, adapters or merges.

Two parts: the structure (shapes of all weights, block numbers taken out) and samples: a few values of up to 96 tensors spread over the model.
Equal dtypes must agree to the bit. Between dtypes the finer samples are rounded to the coarser type first, where all but a few must
agree; a base that was trained further does not pass that, since its values moved by more than rounding. Tensors that are
quantised on one side are compared by the size of their difference only. Statistics that a base keeps in buffers (BatchNorm's) are sampled, too.
Of tables of tokens every row counts (table_rows.py), since rows are added and drawn one by one.
"""

from __future__ import annotations

import base64
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.elsewhere import at_hand, identity, offloaded, ties, whole
from slimtune.core.errors import FormatError
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.still import statistics, tracks
from slimtune.files.table_rows import TableRows, tables, told

TENSORS, VALUES, QUANTISED = 96, 4, 4
_CODES = {torch.float64: "d", torch.float32: "f", torch.float16: "h", torch.bfloat16: "b"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_COARSE = "dfhb"  # coarser types later
_QUANTISED, _UNSEEN = "q", "-"
_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Fingerprint]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a base.

    Attributes:
        structure: weight name with block numbers as "*" -> {shape: how many}.
        types: one letter for each sampled tensor: its dtype, "q" quantised, "-" not looked at.
        values: [len(types), VALUES] float32; zeros where not looked at.
        names: of the sampled tensors; not kept in files, since the structure decides them.
        buffers: name -> VALUES samples of up to TENSORS statistics that the base keeps in buffers; files of 0.1.0 have none.
        rows: name of a table of tokens -> sums over all of its rows; files of 0.1.0 have none.
    """

    structure: dict[str, dict[str, int]]
    types: str
    values: Tensor
    names: tuple[str, ...] = ()
    buffers: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, TableRows] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        raw = bytes(self.values.flatten().view(torch.uint8).tolist())
        out = {"structure": self.structure, "types": self.types, "values": base64.b64encode(raw).decode()}
        rows = {name: table.to_list() for name, table in self.rows.items()}
        return out | ({"buffers": self.buffers} if self.buffers else {}) | ({"rows": rows} if rows else {})

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Fingerprint:
        """Read what `to_dict` wrote.

        Raises:
            FormatError: it cannot be read.
        """
        try:
            raw = bytearray(base64.b64decode(data["values"], validate=True))
            values = torch.frombuffer(raw, dtype=torch.float32) if raw else torch.zeros(0)
            buffers = {str(name): [float(v) for v in sample] for name, sample in data.get("buffers", {}).items()}
            rows = {str(name): TableRows.from_list(table) for name, table in data.get("rows", {}).items()}
            return Fingerprint(data["structure"], data["types"], values.reshape(len(data["types"]), VALUES), buffers=buffers, rows=rows)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(f"the fingerprint of the base cannot be read: {error}") from None

    def compare(self, now: Fingerprint) -> list[str]:
        """Return what differs in words, nothing if both are of the same base; `self` is the older one."""
        out = []
        for name in [*self.structure, *(n for n in now.structure if n not in self.structure)]:
            old, new = self.structure.get(name, {}), now.structure.get(name, {})
            if old != new:
                out.append(f"{name}: {_counts(old)} when it was saved, {_counts(new)} here")
        return out or [*self._compare_values(now), *self._compare_buffers(now), *(told(*table) for table in self.other_rows(now).items())]

    def other_rows(self, now: Fingerprint) -> dict[str, list[tuple[int, int]]]:
        """Return the tables of tokens, seen on both sides, whose rows differ by more than rounding -> where, as (first, one past the last)."""
        both = [(name, table.differs(now.rows[name])) for name, table in self.rows.items() if name in now.rows]
        return {name: ranges for name, ranges in both if ranges}

    def moved(self, now: Fingerprint) -> list[str]:
        """Return the names of sampled weights that differ by more than rounding, [] where the structure does."""
        if self.structure != now.structure or len(self.types) != len(now.types):
            return []
        samples = zip(now.names, self.types, now.types, self.values, now.values, strict=True)
        off = [name for name, a, b, x, y in samples if not {a, b} & {_UNSEEN, _QUANTISED} and _unequal(x, y, a, b)]
        return [*off, *(name for name in self.other_rows(now) if name not in off)]

    def _compare_buffers(self, now: Fingerprint) -> list[str]:
        off = [
            name for name, old in self.buffers.items()
            if name in now.buffers and not all(math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-6) for a, b in zip(old, now.buffers[name], strict=False))
        ]  # fmt: skip
        return [f"the statistics of {len(off)} module(s) differ, as in {', '.join(off[:3])}"] if off else []

    def _compare_values(self, now: Fingerprint) -> list[str]:
        if len(self.types) != len(now.types):
            return ["its weights were sampled in another way"]
        off: dict[str, float] = {}  # name -> how far its samples moved, by their own size
        seen, wrong, allowed = 0, 0, 0.0
        far, size = 0.0, 0.0
        for i, (a, b) in enumerate(zip(self.types, now.types, strict=True)):
            x, y = self.values[i], now.values[i]
            if _UNSEEN in (a, b):
                continue
            if _QUANTISED in (a, b):
                far, size = far + float((x - y).square().sum()), size + float(x.square().sum())
                continue
            bad = _unequal(x, y, a, b)
            seen, wrong, allowed = seen + VALUES, wrong + bad, allowed + VALUES * _share(a, b)
            if bad:
                off[now.names[i]] = float((x - y).norm() / x.norm().clamp(min=1e-30))
        out = []
        if wrong > allowed:
            first = ", ".join(list(off)[:3])
            how = "it is another model" if sorted(off.values())[len(off) // 2] > 0.5 else "it was trained further"
            out.append(f"{wrong} of {seen} sampled weights differ, as in {first}: {how}")
        if far > 0.16 * size:
            out.append(f"the quantised weights are off by {(far / size) ** 0.5 if size else 1:.0%}, more than quantisation does")
        return out


def _unequal(x: Tensor, y: Tensor, a: str, b: str) -> int:
    """Return how many values differ by more than rounding."""
    if a != b:
        coarse = _DTYPES[max(a, b, key=_COARSE.index)]
        near = (x - y).abs() <= (6e-8 if "h" in (a, b) else 0.0)  # the spacing of the smallest float16
        x, y = x.to(coarse).float(), y.to(coarse).float()
        return int((~(near | (x == y) | (x.isnan() & y.isnan()))).sum())
    return int((~((x == y) | (x.isnan() & y.isnan()))).sum())


def _share(a: str, b: str) -> float:
    """Return which share of values may differ: none within a dtype; some where rounding twice can go either way."""
    return 0.0 if a == b else 0.2 if {a, b} == {"h", "b"} else 0.02


def _counts(shapes: dict[str, int]) -> str:
    return ", ".join(f"{n} x {shape}" for shape, n in shapes.items()) or "none"


def fingerprint(model: nn.Module, *, without: Iterable[str] = ()) -> Fingerprint:
    """Return the fingerprint of a model's base; adapters do not count, merged ones must be lifted out by the caller.

    Args:
        model: any module.
        without: paths of modules to leave out, with everything below them.
    """
    without = tuple(sorted(without))
    skip = tuple(f"{p}." for p in without)
    found: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    seen: set[Any] = set()
    modules = base_modules(model)
    tied = ties(model) if any(offloaded(m) for m in modules.values()) else {}  # where offloading has cut them
    for path, module in modules.items():
        for name, p in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if p is None or full.startswith(skip) or tied.get(full, full) in found:
                continue
            if (same := identity(module, name, p)) not in seen:
                seen.add(same)
                found[full] = (module, name, p)
    groups: dict[str, list[str]] = {}
    structure: dict[str, dict[str, int]] = {}
    for full, (module, name, p) in found.items():
        star = ".".join("*" if part.isdigit() else part for part in full.split("."))
        groups.setdefault(star, []).append(full)
        shape = "x".join(map(str, _shape(module, name, p))) or "1"
        counts = structure.setdefault(star, {})
        counts[shape] = counts.get(shape, 0) + 1
    chosen = _choose(groups)
    of_tokens = tables(model, found)
    looked = [*chosen, *(n for n in of_tokens if n not in chosen)]
    key = (without, tuple((n, identity(*found[n]), *_stamp(found[n][2])) for n in looked), str(structure))
    cached = _CACHE.get(model)
    if cached is None or cached[0] != key:
        types, values, sums = _sample([found[n] for n in looked], len(chosen), {looked.index(n) for n in of_tokens})
        rows = {looked[i]: table for i, table in sums.items()}
        cached = (key, Fingerprint(structure, types, values, tuple(chosen), rows=rows))
        _CACHE[model] = cached
    buffers = _buffers(model, skip)
    return replace(cached[1], buffers=buffers) if buffers else cached[1]


def _buffers(model: nn.Module, skip: tuple[str, ...]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for path, module in base_modules(model).items():
        if tracks(module) and not f"{path}.".startswith(skip) and len(found) < TENSORS:
            for name, b in statistics(module).items():
                if b.numel() and b.device.type != "meta":
                    found[f"{path}.{name}" if path else name] = [float(v) for v in b.detach().flatten()[:: max(1, b.numel() // VALUES)][:VALUES]]
    return found


def _stamp(p: nn.Parameter) -> tuple[Any, ...]:
    """Return what changes when a parameter is written to, moved or cast."""
    return p.dtype, 0 if p.device.type == "meta" or hasattr(p, "device_mesh") else p.data_ptr(), 0 if p.is_inference() else p._version


def _shape(module: nn.Module, name: str, p: nn.Parameter) -> tuple[int, ...]:
    if p.is_floating_point():
        return tuple(p.shape)
    kind = kind_at(module)
    return kind.shape(module, name) if kind.quantised and name == "weight" else tuple(p.shape)


def _choose(groups: dict[str, list[str]]) -> list[str]:
    """Return up to TENSORS names, spread over all groups and, within one, over the blocks."""
    each = max(TENSORS // max(len(groups), 1), 1)
    chosen = []
    for names in groups.values():
        n = min(each, len(names))
        chosen += [names[round(i * (len(names) - 1) / max(n - 1, 1))] for i in range(n)]
    step = max(len(chosen) / TENSORS, 1)
    return [chosen[int(i * step)] for i in range(int(len(chosen) / step))]


def _sample(looked: list[tuple[nn.Module, str, nn.Parameter]], first: int, of_tokens: set[int]) -> tuple[str, Tensor, dict[int, TableRows]]:
    """Return types and samples of the first ones, and the sums over all rows of those with these indices."""
    types, parts = "", []
    rows: dict[int, TableRows] = {}
    quantised = sorted((p.numel(), i) for i, (m, n, p) in enumerate(looked[:first]) if n == "weight" and kind_at(m).quantised)
    small = {i for _, i in quantised[:QUANTISED]}
    with torch.no_grad():
        for i, (module, name, p) in enumerate(looked):
            t: Tensor | None = None
            code = _UNSEEN
            if (p.device.type == "meta" and not offloaded(module)) or p.numel() == 0:
                pass
            elif i in small:
                with at_hand(module):
                    t, code = kind_at(module).read(module, name), _QUANTISED
            elif p.dtype in _CODES and not (name == "weight" and kind_at(module).quantised):
                with at_hand(module, inside=False):
                    t, code = whole(module._parameters[name]), _CODES[p.dtype]  # type: ignore[arg-type]
            if t is not None and code in _DTYPES and i in of_tokens:
                rows[i] = TableRows.of(t)
            if i >= first:
                continue
            if t is None:
                parts.append(torch.zeros(VALUES))
            else:
                at = torch.tensor([(int((k + 0.5) * t.numel() / VALUES) + 7919 * k) % t.numel() for k in range(VALUES)], device=t.device)
                parts.append(torch.take(t, at).float())
            types += code
        values = torch.stack([v.cpu() for v in parts]) if parts else torch.zeros(0, VALUES)
    return types, values, dict(sorted(rows.items()))
