"""From a file to finished ops: built blank, directly at their module paths, and filled; the model is not touched (`core.placing` does that).

Costs what the new adapter costs: nothing here walks over adapters that are attached already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from slimtune.core.elsewhere import at_hand
from slimtune.core.errors import FileError, FormatError, MismatchError, SiteError, SlimtuneError, closest
from slimtune.core.finite import non_finite
from slimtune.core.op import Op
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.files.layouts.base import Layout, Place, Taker
from slimtune.methods.bitfit import BitFit
from slimtune.methods.dense import Dense


def owner(place: Place, spec: Spec) -> Spec:
    """Return the spec that builds the op of a place in an adapter with this spec.

    Raises:
        FormatError: none does.
    """
    parts = spec.parts()
    if place.part is not None:
        parts = parts[place.part : place.part + 1] if type(place.part) is int and place.part >= 0 else ()
    found = next((p for p in parts if p.method == place.method), None)
    if found is None and place.part is None and place.method in {"dense", "bitfit"}:  # what a file may hold beside its method's ops
        return Dense() if place.method == "dense" else BitFit(missing="add")
    if found is None:
        raise FormatError(f"the file holds ops of {place.method!r} in an adapter of {spec.method!r}")
    return found


def ready(model: nn.Module, spec: Spec, places: list[Place]) -> None:
    """Ask every recipe of an adapter whether this base is ready for the ops of a file.

    Raises:
        MismatchError: one is not, with what to do.
    """
    for i, part in enumerate(spec.parts()):
        part.before_load(model, {p.path: p.settings for p in places if p.method == part.method and p.part in {None, i}})


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


def make_ops(
    model: nn.Module, spec: Spec, places: list[Place], layout: Layout, taker: Taker, dtype: torch.dtype | None
) -> list[tuple[Site, str, Op]]:
    """Build the ops of a file and fill them with its tensors; the model is not touched.

    Raises:
        MismatchError: they do not fit; every missing or mis-shaped tensor is named, up to eight.
        FormatError: the settings in the file make no sense.
    """
    where, made, wrong = str(taker.file.path), [], []  # type: ignore[var-annotated]
    shared: dict[int | None, dict[str, Any]] = {}
    layout.prepare(places, model)
    for place in places:
        module = module_at(model, place.path, where)
        kind = kind_at(module)
        if place.port not in kind.ports:
            raise MismatchError(f"{kind.noun} has no place for an op at its {place.port}", where=f"{place.path} ({type(module).__name__})")
        if place.param not in kind.names(module) and (place.port == "weight" or place.param != "weight"):
            raise MismatchError(f"{place.path} ({type(module).__name__}) has no weight {place.param!r}", where=where)
        if problem := kind.problem(module):
            raise SiteError(problem, where=place.path)
        shape = kind.shape(module, place.param) if kind.params else ()
        site = Site(path=place.path, port=place.port, kind=kind, module=module, param=place.param, shape=shape)
        if site.device.type == "meta":
            raise MismatchError("the base has no weights yet (its device is meta)", where=place.path, hint="load the base's weights first")
        if place.entrance:
            entrance = module_at(model, place.entrance, where)
            site = site.at_entrance(place.entrance, entrance, kind_at(entrance))
        maker = owner(place, spec)
        if problems := maker.check(site):
            raise MismatchError(f"{site}: {problems[0]}", where=where)
        site = site.for_build(dtype, True, shared.setdefault(place.part, {}), loading=True)
        op = maker.make(site, place.part)
        op.resume(place.settings, site)
        with at_hand(module) if place.port == "weight" else contextlib.nullcontext():
            tensors = layout.codec(place.method).take(place, op, module, kind, taker)
            wants = op.expects(module)
        if set(tensors) != set(wants):
            raise MismatchError(f"the file holds {sorted(tensors)} for {place}, its method needs {sorted(wants)}", where=where)
        odd = {n: t.shape for n, t in tensors.items() if t is not None and tuple(t.shape) != wants[n]}
        bad = [f"{place} {n}: {list(shape)} in the file, {list(wants[n])} here" for n, shape in odd.items()]
        wrong += bad
        whole = {n: t for n, t in tensors.items() if t is not None}
        if not bad and len(whole) == len(tensors):
            with at_hand(module) if place.port == "weight" else contextlib.nullcontext():
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


def not_finite(made: list[tuple[Site, str, Op]]) -> list[str]:
    """Return the tensors of finished ops that hold NaN or infinity, by where they sit."""
    return non_finite((f"{site.path}.{name}", p) for site, _, op in made for name, p in op.named_parameters())


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
