"""Putting the ops of a file onto a model: directly at their module paths, blank, and all of them or none.

Costs what the new adapter costs: nothing here walks over adapters that are attached already.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slimtune.core.attach import check_name
from slimtune.core.errors import FileError, FormatError, MergeError, MismatchError, NameInUse, SiteError, SlimtuneError, closest
from slimtune.core.host import Rooted, Slot, generalise, host, specialise, unhost, wrap_checkpoints
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.plan import Plan
from slimtune.core.report import Report, Row, base_name, true_numel
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, State
from slimtune.core.targets import kind_of
from slimtune.files.layouts.base import Layout, Place, Taker
from slimtune.files.layouts.patterns import base_modules
from slimtune.methods.bitfit import BitFit, BitFitOp
from slimtune.methods.dense import Dense, DenseOp
from slimtune.ports.attention import switch_fast_path


def method_of(op: Op, spec: Spec) -> str:
    """Return the method an op belongs to: that of its adapter's spec, or of a helper that may stand beside it."""
    return "dense" if isinstance(op, DenseOp) else "bitfit" if isinstance(op, BitFitOp) else spec.method


def owner(method: str, spec: Spec) -> Spec:
    """Return the spec that builds the ops of a method for an adapter with this spec.

    Raises:
        FormatError: none does.
    """
    if method == spec.method:
        return spec
    if method in {"dense", "bitfit"}:
        return Dense() if method == "dense" else BitFit(missing="add")
    raise FormatError(f"the file holds ops of {method!r} in an adapter of {spec.method!r}")


def check_free(model: nn.Module, name: str) -> None:
    """Raise unless an adapter of this name can be put onto the model now.

    Raises:
        NameInUse, MergeError, SiteError: it cannot.
    """
    check_name(name)
    state: State | None = model.__dict__.get("slim_state")
    if state is None:
        inside = next((p for p, m in model.named_modules() if p and "slim_state" in m.__dict__), None)
        if inside is not None:
            raise SiteError(f"a part of this model carries adapters already: {inside}", hint="load onto the same object every time")
    elif name in state.adapters:
        raise NameInUse(f"an adapter is called {name!r} already", hint=f"st.load(..., name=another), or st.detach(model, {name!r}) first")
    elif state.merged:
        raise MergeError("an adapter is merged into the weights now", hint="st.unmerge(model) first")


def module_at(model: nn.Module, path: str, where: str) -> nn.Module:
    """Return a module of the base.

    Raises:
        MismatchError: the model has none there.
    """
    module: nn.Module | None = model
    for part in path.split(".") if path else []:
        module = None if part == "slim" else module._modules.get(part)  # type: ignore[union-attr]
        if module is None:
            paths = base_modules(model)
            like = [p for p in paths if p.endswith(path.rpartition(".")[2])]
            raise MismatchError(
                f"the file adapts {path!r}, which this model does not have",
                where=where,
                hint=f"closest: {closest(path, like or paths)}; is it the right base?",
            )
    assert module is not None
    return module


def kind_at(module: nn.Module) -> Kind:
    """Return the kind of a module, without a search where it is hosted already."""
    slot = module._modules.get("slim")
    if isinstance(slot, Slot):
        return slot.kind
    kind = kind_of(module)
    assert kind is not None, "BlockKind fits every module"
    return kind


def make_ops(
    model: nn.Module, spec: Spec, places: list[Place], layout: Layout, taker: Taker, dtype: torch.dtype | None
) -> list[tuple[Site, str, Op]]:
    """Build the ops of a file and fill them with its tensors; the model is not touched.

    Raises:
        MismatchError: they do not fit; every missing or mis-shaped tensor is named, up to eight.
        FormatError: the settings in the file make no sense.
    """
    where, shared, made, wrong = str(taker.file.path), {}, [], []  # type: ignore[var-annotated]
    layout.prepare(places, model)
    for place in places:
        module = module_at(model, place.path, where)
        kind = kind_at(module)
        if place.port not in kind.ports:
            raise MismatchError(f"a {kind.name} has no place for an op at its {place.port}", where=f"{place.path} ({type(module).__name__})")
        if place.param not in kind.names(module) and (place.port, place.param) not in {("input", "weight"), ("output", "weight")}:
            raise MismatchError(f"{place.path} ({type(module).__name__}) has no weight {place.param!r}", where=where)
        if problem := kind.problem(module):
            raise SiteError(problem, where=place.path)
        shape = kind.shape(module, place.param) if kind.params else ()
        site = Site(path=place.path, port=place.port, kind=kind, module=module, param=place.param, shape=shape)
        if site.device.type == "meta":
            raise MismatchError("the base has no weights yet (its device is meta)", where=place.path, hint="load the base's weights first")
        maker = owner(place.method, spec)
        if problems := maker.check(site):
            raise MismatchError(f"{site}: {problems[0]}", where=where)
        op = maker.build(site.for_build(dtype, True, shared))
        op.resume(place.settings, site)
        tensors = layout.codec(place.method).take(place, op, module, kind, taker)
        wants = op.expects(module)
        if set(tensors) != set(wants):
            raise MismatchError(f"the file holds {sorted(tensors)} for {place}, its method needs {sorted(wants)}", where=where)
        odd = {n: t.shape for n, t in tensors.items() if t is not None and tuple(t.shape) != wants[n]}
        bad = [f"{place} {n}: {list(shape)} in the file, {list(wants[n])} here" for n, shape in odd.items()]
        wrong += bad
        whole = {n: t for n, t in tensors.items() if t is not None}
        if not bad and len(whole) == len(tensors):
            op.reset_from(whole, module)
            made.append((site, place.key, op))
    if taker.missing:
        raise MismatchError(
            f"{len(taker.missing)} tensor(s) are missing in the file: {', '.join(taker.missing[:8])}",
            where=where,
            hint="fetch or save it again; is it the right base?",
        )
    if wrong:
        raise MismatchError(
            f"{len(wrong)} tensor(s) have the wrong shape: {'; '.join(wrong[:8])}", where=where, hint="this adapter was made for another base model"
        )
    return made


def install(model: nn.Module, name: str, spec: Spec, made: list[tuple[Site, str, Op]], trainable: bool) -> Adapter:
    """Put finished ops into the model. The first adapter of a model comes into use at once, as does one to be trained."""
    state: State | None = model.__dict__.get("slim_state")
    first = state is None
    adapter = Adapter(name, spec, trainable=trainable)
    try:
        if state is None:
            state = State()
            model.slim_state = state  # type: ignore[assignment]
            specialise(model, Rooted)
            wrap_checkpoints(model, state)
        for site, key, op in made:
            op.train(site.module.training)
            host(site.module, state, site.kind, site.path).put(name, key, op)
            adapter.ops[(site.path, key)] = op
        if any(_in_encoder(model, site.path) for site, _, _ in made):
            switch_fast_path(model, state)
    except BaseException:
        for site, _, _ in made:
            slot = site.module._modules.get("slim")
            if isinstance(slot, Slot):
                slot.drop(name)
                unhost(site.module)
        if first:
            generalise(model, Rooted)
            model.__dict__.pop("slim_state", None)
        raise
    state.adapters[name] = adapter
    if first or trainable:
        for module in base_modules(model).values():
            for p in module._parameters.values():
                if p is not None:
                    p.requires_grad_(False)
    for p in adapter.parameters():
        p.requires_grad_(trainable)
    adapter.live = trainable
    if trainable:
        for other in state.adapters.values():
            if other is not adapter:
                other.set_live(False)
    if first or trainable:
        state.settle(Plan.of(name))
    return adapter


def _in_encoder(model: nn.Module, path: str) -> bool:
    module: Any = model
    for part in ["", *path.split(".")]:
        module = module._modules[part] if part else module
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            return True
    return False


def report_of(model: nn.Module, adapter: Adapter, notes: list[str]) -> Report:
    """Return the report of an adapter, without looking at any other."""
    rows, covered, own, left = [], set(), {}, {}  # type: ignore[var-annotated]
    for (path, _), op in adapter.ops.items():
        covered.add(path)
        params = list(op.parameters())
        live = sum(p.numel() for p in params if p.requires_grad)
        rows.append(Row(path, base_name(model.get_submodule(path)), op.port, op.param, op.shape, live, sum(p.numel() for p in params)))
        own.update({id(t): t for t in (*params, *op.buffers())})
    base: dict[int, nn.Parameter] = {}
    for path, module in base_modules(model).items():
        base.update({id(p): p for p in module._parameters.values() if p is not None})
        kind = kind_at(module)
        if path not in covered and kind.params and kind.names(module):
            key = f"{base_name(module)} {'x'.join(map(str, kind.shape(module, kind.names(module)[0])))}"
            left[key] = left.get(key, 0) + 1
    return Report(
        name=adapter.name,
        method=adapter.spec.method,
        rows=rows,
        left=left,
        trainable=sum(r.trainable for r in rows),
        total=sum(true_numel(p) for p in base.values()) + sum(r.total for r in rows),
        bytes=sum(t.numel() * t.element_size() for t in own.values()),
        base_bytes=sum(p.numel() * p.element_size() for p in base.values()),
        notes=notes,
    )


def not_finite(made: list[tuple[Site, str, Op]]) -> int:
    """Return how many tensors hold NaN or infinity."""
    return sum(not math.isfinite(float(p.detach().float().abs().sum())) for _, _, op in made for p in op.parameters())


@contextlib.contextmanager
def one_error(where: str) -> Iterator[None]:
    """Turn whatever a hostile file makes the code below fall over into an error of ours.

    Raises:
        FormatError: with the original error's words.
    """
    try:
        yield
    except SlimtuneError as error:
        if isinstance(error, FileError):
            if error.where:
                raise
            raise type(error)(error.what, where=where, hint=error.hint) from None
        raise MismatchError(error.what, where=error.where or where, hint=error.hint) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise FormatError(f"the adapter cannot be read: {type(error).__name__}: {str(error)[:300]}", where=where) from error
