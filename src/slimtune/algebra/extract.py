"""extract: an adapter out of a fully fine-tuned model: what it has that its base has not, as a LoRA.

    dW = W_tuned - W_base at every target, s B A = its best approximation of rank r; other changed weights stay dense deltas

The tuned model is read tensor by tensor from its files; at no time are two models in memory. Cost: one SVD for each target that changed.
Rounding is part of a difference: a checkpoint in half precision differs from a float32 base everywhere, so load the base in its type.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.algebra.build import Builder, Outcome, label
from slimtune.algebra.change import Change
from slimtune.algebra.checkpoint import Checkpoint, Live
from slimtune.algebra.merge_to_disk import _hollow
from slimtune.algebra.shorten import check_rule, rank_unit, shorten
from slimtune.core.errors import MismatchError, SpecError, closest
from slimtune.core.placing import kind_at
from slimtune.core.site import Site
from slimtune.core.spec import AUTO, Spec
from slimtune.core.state import unwrap
from slimtune.core.targets import candidates
from slimtune.methods.lora import LoRA

RELAX = ("missing", "unexpected")


def extract(
    base: nn.Module,
    tuned: nn.Module | str | Path,
    *,
    to: Spec | None = None,
    energy: float | None = None,
    name: str = "extracted",
    rest: str = "dense",
    dtype: torch.dtype | None = None,
    relax: str | Iterable[str] = (),
) -> Outcome:
    """Make an adapter of the difference between a fine-tuned model and its base, and put it onto the base.

    Args:
        base: the model that was fine-tuned; may be quantised (its rounding is then made up for as well).
        tuned: the folder of its fine-tuned checkpoint (safetensors, sharded or not), which is read tensor by tensor; or a model.
        to: a LoRA: rank and targets. Default: `LoRA()`, on all linear layers.
        energy: instead of its rank: at each weight the smallest rank that keeps this share of |dW|^2.
        name: of the adapter; the first on a model comes into use at once.
        rest: what to do with changed weights that are no targets (norms, embeddings, heads): "dense": keep them as they are; "leave": leave
            them out, and say so in the report. Changed biases are kept where weights are.
        dtype: of the adapter's parameters, as in `attach`.
        relax: "missing": parameters that the checkpoint lacks count as unchanged; "unexpected": tensors it has beyond the model do not count.

    Returns:
        A report with the rank and the relative error of every weight, and notes on what could not be kept.

    Raises:
        MismatchError: the two do not belong together: names or shapes differ.
        FileError, FormatError: the checkpoint cannot be read.
        SpecError, TargetError: `to` does not fit.
        NameInUse, MergeError: as in `attach`.

    Example:
        >>> report = st.extract(model, "out/full", energy=0.95, name="full")  # doctest: +SKIP
        >>> st.save(model, "out/as_lora", name="full")  # doctest: +SKIP
    """
    base = unwrap(base)
    spec = LoRA() if to is None else to
    allowed = frozenset([relax] if isinstance(relax, str) else relax)
    _check(spec, energy, rest, allowed)
    assert isinstance(spec, LoRA)
    builder = Builder(base, name, dtype, replace(spec, train_modules=()))
    source: Checkpoint | Live
    if isinstance(tuned, nn.Module):
        source = Live(unwrap(tuned))
    else:
        source = Checkpoint(tuned, str(getattr(base, "base_model_prefix", "")))
    wanted = {(site.path, site.param) for site in spec.sites(base)}
    reader = _Reader(base, source)
    reader.check(allowed, str(type(tuned).__name__ if isinstance(tuned, nn.Module) else tuned))
    left_out: list[str] = []
    for site in _weights(base):
        change = reader.change(site)
        if change.moves and (site.path, site.param) in wanted and not site.kind.rank_problems(site.module, site.param, rank_unit(change)):
            builder.low_rank(change, shorten(change, None if energy is not None else spec.rank(site), energy))
        elif not change.moves and change.bias is None:
            continue
        elif rest == "leave" and (change.moves or (site.path, site.param) not in wanted):
            left_out.append(label(site))
        elif change.moves:
            builder.dense(change)
        elif change.bias is not None:
            builder.bias(site, change.bias)
    notes = []
    if left_out:
        notes.append(f'{len(left_out)} changed weights were left out (rest="leave"): {", ".join(left_out[:6])}')
    if lost := reader.others():
        notes.append(f"{len(lost)} changed tensors that no adapter can hold were left out: {', '.join(lost[:6])}")
    if reader.rounded:
        notes.append(f"the fine-tuned model is in {reader.rounded}, the base in a finer type: the difference holds that rounding, too")
    return builder.finish(notes=tuple(notes))


def _check(spec: Spec, energy: float | None, rest: str, allowed: frozenset[str]) -> None:
    if type(spec) is not LoRA:  # a method built on LoRA is not one: its ops do more
        raise SpecError(f"extract makes LoRAs, not {spec.method if isinstance(spec, Spec) else repr(spec)}", hint="to=st.LoRA(r=16)")
    spec.validate()
    check_rule(None, energy)
    wrong = [f"rest must be dense or leave, not {rest!r}"] if rest not in ("dense", "leave") else []
    wrong += [f"relax= takes {', '.join(RELAX)}, not {sorted(allowed - set(RELAX))}"] if not allowed <= set(RELAX) else []
    wrong += ["up_bias=True has no meaning here: changed biases are kept"] if spec.up_bias else []
    wrong += ['train_modules= has no meaning here: rest="dense" keeps what else has changed'] if spec.train_modules not in ((), AUTO) else []
    if wrong:
        raise SpecError("; ".join(wrong), where="extract(...)")


def _weights(model: nn.Module) -> list[Site]:
    """Return every weight of a model that an op can sit on."""
    found = []
    for path, module in candidates(model).items():
        kind = kind_at(module)
        if kind.params and not kind.problem(module):
            for param in kind.names(module):
                found.append(Site(path=path, port="weight", kind=kind, module=module, param=param, shape=kind.shape(module, param)))
    return found


class _Reader:
    """Compares a model with another one of the same names, one module at a time."""

    def __init__(self, model: nn.Module, source: Checkpoint | Live) -> None:
        self.model, self.source = model, source
        self.seen: set[int] = set()  # parameters that some site has compared
        self.rounded = ""
        self.latest: tuple[str, Tensor] = ("", torch.empty(0))  # the tuned weight that was read last
        self.aliases: dict[int, list[str]] = {}  # one tensor, all its names: tied weights stand in files once
        self.own: dict[int, Tensor] = {}
        for name, t in Live(model).tensors.items():
            self.aliases.setdefault(id(t), []).append(name)
            self.own[id(t)] = t

    def check(self, allowed: frozenset[str], where: str) -> None:
        """Raise unless the two hold tensors of the same names and shapes; only headers are read."""
        missing, odd = [], []
        for key, names in self.aliases.items():
            shapes = {n: shape for n in names if (shape := self.source.shape(n)) is not None}
            packed = kind_at(self.model.get_submodule(names[0].rpartition(".")[0])).quantised
            if not shapes:
                missing += [] if "missing" in allowed or self.own[key].numel() == 0 else [names[0]]
                continue
            odd += [
                f"{n}: {list(shape)} there, {list(self.own[key].shape)} in the base"
                for n, shape in shapes.items()
                if not packed and shape != tuple(self.own[key].shape)
            ]
            if len(shapes) > 1 and not odd and not self._all_equal(list(shapes)):
                odd.append(f"{' and '.join(shapes)}: one tensor in the base, two different ones there")
        left = [] if "unexpected" in allowed else self.source.left
        if odd:
            raise MismatchError(
                f"{len(odd)} tensor(s) are not alike: {'; '.join(odd[:4])}",
                where=where,
                hint="is it the right base? After new tokens: model.resize_token_embeddings(...) first",
            )
        if missing:
            raise MismatchError(
                f"{len(missing)} tensor(s) of the base are not there: {', '.join(missing[:4])}",
                where=where,
                hint=f"closest to the first: {closest(missing[0], self.source.left) or '-'}; if the format names them otherwise, load the "
                "fine-tuned model and pass it; to take them as unchanged: relax='missing'",
            )
        if left:
            raise MismatchError(
                f"{len(left)} tensor(s) belong to nothing in the base: {', '.join(left[:4])}",
                where=where,
                hint="use the base with the same head (AutoModelFor...); to leave them out: relax='unexpected'",
            )

    def _all_equal(self, names: list[str]) -> bool:
        first, *more = (self.source.tensor(n) for n in names)
        return all(first is not None and t is not None and torch.equal(first, t) for t in more)

    def change(self, site: Site) -> Change:
        """Return what differs at one weight and its bias."""
        module, kind = site.module, site.kind
        other, same = self._tuned(module, site)
        if same:
            return Change(site)
        before, after = kind.bias(module, site.param), kind.bias(other, site.param)
        bias = None
        if before is not None and after is not None:
            work = _work(before)
            d = after.detach().to(before.device, work) - before.detach().to(work)
            bias = d if bool(d.any()) else None
        W = site.read().detach()
        if torch.equal(self._read(site, other), W.to(_work(W))):
            return Change(site, bias=bias)

        def pieces(i: int) -> Tensor:
            then = site.read().detach()
            if self.latest[0] != label(site):
                self.latest = (label(site), self._read(site, self._tuned(module, site)[0]))
            now = self.latest[1]
            if kind.name == "experts":
                return (now[i] - then[i].to(now.dtype))[None]
            return kind.matrices(now - then.to(now.dtype), module)

        return Change(site, pieces=pieces, bias=bias)

    def _read(self, site: Site, other: nn.Module) -> Tensor:
        """Return the tuned weight in canonical shape, in float32 (float64 on a float64 base)."""
        W = other._parameters[site.param] if site.kind.quantised else site.kind.read(other, site.param)
        assert W is not None  # a quantised layer stands for a plain one, which stores its weight as it is
        return W.detach().to(device=site.device, dtype=_work(site.read()))

    def _tuned(self, module: nn.Module, site: Site) -> tuple[nn.Module, bool]:
        """Return a stand-in for a module that holds the tuned tensors, and whether all of them are the base's very values."""
        copied, same = _hollow(module), True
        for name, table, key, t in _tensors(module, copied):
            self.seen.add(id(t))
            new = next((v for n in self.aliases.get(id(t), [f"{site.path}.{name}"]) if (v := self.source.tensor(n)) is not None), None)
            if new is None:
                continue
            self._note_type(new, t)
            same = same and new.shape == t.shape and new.dtype == t.dtype and torch.equal(new.to(t.device), t)
            table[key] = nn.Parameter(new, requires_grad=False)
        return copied, same

    def _note_type(self, new: Tensor, t: Tensor) -> None:
        if t.is_floating_point() and torch.finfo(new.dtype).eps > torch.finfo(t.dtype).eps:
            self.rounded = str(new.dtype).removeprefix("torch.")

    def others(self) -> list[str]:
        """Return the names of changed tensors that no site has looked at."""
        changed = []
        for key, names in self.aliases.items():
            t = self.own[key]
            if key in self.seen or not t.is_floating_point():
                continue
            new = next((v for n in names if (v := self.source.tensor(n)) is not None), None)
            if new is not None and (new.shape != t.shape or not torch.equal(new.to(t.device).float(), t.detach().float())):
                changed.append(names[0])
        return changed


def _work(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _tensors(module: nn.Module, copied: nn.Module) -> list[tuple[str, dict[str, Any], str, Tensor]]:
    """Return (name below the module, table of the copy, key in it, the module's own) of every parameter; slots are not among them."""
    found: list[tuple[str, dict[str, Any], str, Tensor]] = []
    for prefix, part in copied.named_modules():
        original = module.get_submodule(prefix)
        for key, t in original._parameters.items():
            if t is not None:
                found.append((f"{prefix}.{key}" if prefix else key, part._parameters, key, t))
    return found
