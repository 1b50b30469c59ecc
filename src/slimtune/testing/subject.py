"""Subject: one method on one case, with the steps that the properties are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import SlimtuneError
from slimtune.core.fold import first_tensor
from slimtune.core.op import Op, affine
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, State
from slimtune.testing.cases import Case, Inputs

STEPS = 8  # optimiser steps that a property trains for, at most


@dataclass(frozen=True)
class Subject:
    """A spec and a case."""

    spec: Spec
    case: Case

    # ---- set-up -------------------------------------------------------------------------------------------------
    def placed(self) -> Spec:
        """Return the spec with the case's targets, and with the length of training where it asks for one (`scheduled(steps)`)."""
        spec: Spec = self.spec.scheduled(STEPS) if hasattr(self.spec, "scheduled") else self.spec
        return spec if self.case.targets is None else dataclasses.replace(spec, targets=self.case.targets)

    def attached(self, *names: str, dtype: torch.dtype | None = None, busy: bool = True, model: nn.Module | None = None) -> nn.Module:
        """Return the case's model with adapters of these names, the last one in use.

        Args:
            dtype: of the base; default: the case's.
            busy: fill the adapters with random values, so that each does something else.
            model: attach to this one instead of a new one.
        """
        model = model if model is not None else self.case.build(dtype)
        with torch.random.fork_rng(devices=[]):
            for i, name in enumerate(names):
                torch.manual_seed(10 + i)
                st.attach(model, self.placed(), name=name)
                if busy:
                    fill(model, name)
        return model

    def expected_problem(self, model: nn.Module) -> str:
        """Return why spec and kind themselves say that this method cannot sit here, or ""."""
        found: list[str] = []
        for part in self.placed().parts():
            try:
                sites = part.sites(model)
            except SlimtuneError as error:
                return error.what
            if not sites and not part.optional:
                return "no site"
            found += [site.kind.problem(site.module) for site in sites]
            found += [p for site in sites for p in part.check(site)]
        return next((p for p in found if p), "")

    # ---- what it can do -----------------------------------------------------------------------------------------
    def ops(self, model: nn.Module, name: str) -> dict[tuple[str, str], Op]:
        return adapter_of(model, name).ops

    def can_merge(self, model: nn.Module, name: str = "a") -> bool:
        """Every op has an exact form on weight or bias."""
        return all(affine(op) for op in self.ops(model, name).values())

    def can_sum(self, model: nn.Module, name: str = "a") -> bool:
        """No op replaces the output it finds."""
        return not any(hasattr(op, "turn") for op in self.ops(model, name).values())

    # ---- running ------------------------------------------------------------------------------------------------
    def out(self, model: nn.Module, n: int = 4, dtype: torch.dtype | None = None) -> Tensor:
        """Run the case's batch of n rows without gradients."""
        with torch.no_grad():
            return run(model, self.case.inputs(n, dtype))

    def close(self, got: Tensor, want: Tensor, what: str, rtol: float | None = None) -> None:
        """Assert that two tensors agree to the case's tolerance, relative to the largest entry."""
        close(got, want, what, self.case.rtol if rtol is None else rtol)


    def same(self, got: Tensor, want: Tensor, what: str) -> None:
        """Assert that two runs of the same computation agree: up to the last bits, which follow from where tensors lie in memory."""
        close(got, want, what, 32 * torch.finfo(want.dtype).eps)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call a model and return its main tensor."""
    return first_tensor(model(*inputs))


def state(model: nn.Module) -> State:
    found: State = model.__dict__["slim_state"]
    return found


def adapter_of(model: nn.Module, name: str) -> Adapter:
    return state(model).adapter(name)


def fill(model: nn.Module, name: str, std: float = 0.15) -> None:
    """Move every parameter of an adapter away from where it starts, by random values."""
    with torch.no_grad():
        for p in dict.fromkeys(adapter_of(model, name).parameters()):
            p.add_(torch.randn(p.shape, dtype=torch.float64).to(p.dtype), alpha=std)


def close(got: Tensor, want: Tensor, what: str, rtol: float) -> None:
    """Assert that two tensors agree, relative to the largest entry."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    scale = max(1e-6, want.abs().max().item())
    gap = (got.double() - want.double()).abs().max().item()
    assert gap <= rtol * scale, f"{what}: differs by {gap:.3g} where the largest entry is {scale:.3g} (allowed: {rtol:g} of it)"


def differ(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that two tensors clearly differ, so that a comparison of them means something."""
    gap = (got.double() - want.double()).abs().max().item()
    assert gap > 1e-3 * want.abs().max().item(), f"{what}: nothing changed"


def bits(model: nn.Module) -> dict[str, bytes]:
    """Return the raw bytes of everything a model holds: parameters, buffers, and what quantised parameters carry."""
    found: dict[str, bytes] = {}
    for path, module in model.named_modules():
        if "slim" in path.split("."):
            continue
        for key, t in [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]:
            found[key] = raw(t)
            quant = t.__dict__.get("quant_state")
            if quant is not None:
                found |= {f"{key}.{k}": raw(v) for k, v in quant.as_dict(packed=True).items() if isinstance(v, Tensor)}
            if "SCB" in t.__dict__:  # the scales of an 8-bit weight move from the parameter to its module at the first call
                scales = t.SCB if t.SCB is not None else module.state.SCB
                found[f"{key}.SCB"] = raw(scales)
    return found


def raw(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(m) for path, m in model.named_modules() if ".slim." not in f".{path}."}


@contextmanager
def refused(*kinds: type[SlimtuneError], what: str, place: bool = False) -> Iterator[None]:
    """Assert that the block raises one of our own errors, with a hint and, if `place`, the module it speaks of."""
    caught: SlimtuneError | None = None
    try:
        yield
    except kinds as error:
        caught = error
    assert caught is not None, f"{what}: nothing was raised"
    assert caught.what, f"{what}: the error does not say what happened"
    assert caught.where or not place, f"{what}: the error names no place: {caught}"
    assert caught.hint, f"{what}: the error has no hint: {caught}"


def gradients(model: nn.Module, name: str) -> list[Any]:
    """Return the gradients of an adapter's parameters and clear them."""
    found = []
    for p in dict.fromkeys(adapter_of(model, name).parameters()):
        found.append(None if p.grad is None else p.grad.clone())
        p.grad = None
    return found


def same_gradients(got: list[Any], want: list[Any], what: str, rtol: float) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None), f"{what}: a gradient is missing"
        if g is not None:
            close(g, w, what, rtol)
