"""DoRA: W' = m * (W + dW) / |W + dW|, a modifier that gives any additive op a trained magnitude m for each output.

Paper: arXiv 2402.09353; the norm gets no gradient (section 4.3). m starts as |W|, so the output starts unchanged.
Cost: b more parameters per site. For a low-rank dW the norm is taken in Gram form,
|W_i + s B_i A|^2 = |W_i|^2 + 2 s B_i (W A^T)_i + s^2 B_i (A A^T) B_i^T, without any [b, a] temporary: 2 b a r FLOPs, |W_i|^2 cached.
A row of zeros has no direction: where |W + dW| = 0 the gain m / |W + dW| counts as 0, in forward, gradient and merged weight alike, so that a
row of zeros in the base stays one.
Cannot: be part of a weighted sum (it rescales the weight it finds); stacks are fine.
Choose it when LoRA at a small rank falls short of full fine-tuning and a somewhat slower step is acceptable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import SpecError
from slimtune.core.fold import Chain
from slimtune.core.modifier import Modifier
from slimtune.core.op import Additive, Op
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.kernels.gain import is_kept, scale_outputs
from slimtune.kernels.lowrank import fusing
from slimtune.methods.lora import LoRA
from slimtune.ports.effective import effective, effective_bias, of_param


class DoRAOp(Op):
    """m [b] over an additive op."""

    roles = {"m": "gain"}

    def __init__(self, site: Site, inner: Additive) -> None:
        super().__init__(site)
        self.inner = inner
        if site.blank:
            start = torch.empty(site.b, device=site.device, dtype=site.dtype)
        else:
            start = row_norms(site.read().detach().to(torch.float32 if site.dtype != torch.float64 else site.dtype), site.kind.out_axis)
        self.m = nn.Parameter(start.to(site.dtype))
        self._holding = False
        self._held: Tensor | None = None
        self._alone: bool | None = None
        self._watched: Tensor | None = None
        self._squares: tuple[Tensor, int, Tensor] | None = None  # (the base's parameter, its version, |W_i|^2)
        self._dead = False  # whether one of these is 0

    def weight(self, W: Tensor) -> Tensor:
        V = self.inner.weight(W)
        return V * self.kind.over_outputs(gain_of(self.m.to(V.device, V.dtype), row_norms(V, self.kind.out_axis)), V)

    def by_rows(self) -> bool:
        return self.kind.out_axis == 0 and self.inner.by_rows()

    def weight_rows(self, W: Tensor, at: slice) -> Tensor:
        V = self.inner.weight_rows(W, at)
        return V * self.kind.over_outputs(gain_of(self.m[at].to(V.device, V.dtype), row_norms(V, self.kind.out_axis)), V)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.inner.bias(b) if hasattr(self.inner, "bias") else b  # type: ignore[operator]  # the magnitude is the weight's alone

    def turn(self, x: Tensor, y: Tensor, host: nn.Module, before: Chain) -> Tensor:
        b = effective_bias(self.kind.bias(host, self.param), of_param(before, self.param))  # as it stands in y
        new = self.bias(b)
        gone = new if new is not None and new is not b else b  # what the inner op makes of y holds its own bias
        z = self.inner.add(x, y if gone is None else y - self.kind.along_output(gone.to(y.dtype), y), host, None)
        return self.magnify(z, new, host, before)

    def magnify(self, z: Tensor, b: Tensor | None, host: nn.Module, before: Chain) -> Tensor:
        """Return m / |W + dW| times z, plus b [b] or None; z [..., b] is what W + dW made without a bias."""
        norm = self._held
        if norm is None:
            with torch.no_grad():
                norm = self.norm(host, before)
            self._held = norm if self._holding else None
        gain = gain_of(self.m, norm)
        if fusing(z) and self._may_write(z, host) and not (b is not None and b.requires_grad) and not self._dead_rows(host):
            y = scale_outputs(z, gain, None if b is None else b.detach())
            return y if not torch.is_grad_enabled() or self._left_alone() else self._watch(y.clone())
        z = z * self.kind.along_output(gain.to(z.dtype), z)
        return z if b is None else z + self.kind.along_output(b.to(z.dtype), z)

    def _left_alone(self) -> bool:
        """Tell whether the model leaves this layer's result as it is; some add the residual into it. What it did in its first step says so."""
        if self._alone is None and self._watched is not None:
            self._alone = self._watched._version == 0
            self._watched = None
        return bool(self._alone)

    def _watch(self, y: Tensor) -> Tensor:
        """Return y, a fresh copy of which backward needs nothing; until it is known what becomes of it, its version is watched."""
        if self._alone is None:
            self._watched = y.detach()
        return y

    def _may_write(self, z: Tensor, host: Any) -> bool:
        """Tell whether z is a plain layer's fresh result that stays as it is until backward."""
        if self.kind.name != "linear" or z._is_view() or host.slim.state.writes_over:
            return False
        return not (z.is_leaf and z.requires_grad) and not is_kept(z)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the first norm for all calls inside: the method's gradient takes it for a constant (section 4.3)."""
        self._holding = True
        try:
            yield
        finally:
            self._holding, self._held = False, None

    def norm(self, host: nn.Module, before: Chain) -> Tensor:
        """Return |W + dW| of every output, [b], in the parameters' type, where W is what the links before make of the base's weight."""
        W = self.kind.read(host, self.param)
        before = of_param(before, self.param)
        if before:
            W, _ = effective(W, None, before, host)
            return row_norms(W.to(self.m.dtype) + self.inner.delta().to(self.m.dtype), self.kind.out_axis)
        pair = self.inner.low_rank() if hasattr(self.inner, "low_rank") and W.dim() == 2 and self.kind.out_axis == 0 else None  # type: ignore[operator]
        if pair is None:
            return row_norms(W.to(self.m.dtype) + self.inner.delta().to(self.m.dtype), self.kind.out_axis)
        A, B, s, _ = pair
        if torch.compiler.is_compiling():
            return self._gram(W, A, B, s, W.to(self.m.dtype).square().sum(1))
        return self._gram(W, A, B, s, self._base_squares(host, W))

    def _base_squares(self, host: nn.Module, W: Tensor | None = None) -> Tensor:
        """Return |W_i|^2 of the base's own rows, worked out anew when they have changed."""
        source = host._parameters.get(self.param)  # kept itself, not its id: a new parameter must never pass for the old one
        if source is None:  # computed anew for each forward, as by a parametrization
            squares = (self.kind.read(host, self.param) if W is None else W).detach().to(self.m.dtype).square().sum(1)
            self._dead = bool((squares == 0).any())
            return squares
        if self._squares is None or self._squares[0] is not source or self._squares[1] != source._version:
            W = self.kind.read(host, self.param) if W is None else W
            squares = W.detach().to(self.m.dtype).square().sum(1)
            self._squares = (source, source._version, squares)
            self._dead = bool((squares == 0).any())
        return self._squares[2]

    def _dead_rows(self, host: nn.Module) -> bool:
        """Tell whether rows of the base are zero: their gain is, too, and what was before it cannot be had back from the result."""
        self._base_squares(host)
        return self._dead

    def _gram(self, W: Tensor, A: Tensor, B: Tensor, s: float, squares: Tensor) -> Tensor:
        WA = (W @ A.to(W.dtype).T).to(A.dtype)  # [b, a] @ [a, r] -> [b, r]
        rest = (torch.addmm(WA, B, A @ A.T, beta=2 * s, alpha=s * s) * B).sum(1)  # 2 s B (W A^T) + s^2 B (A A^T) B^T, row by row
        return (squares + rest).clamp_min_(0.0).sqrt_()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None, "_watched": None}

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        self.inner.resume(settings, site)


def row_norms(W: Tensor, axis: int) -> Tensor:
    """Return the norm of W over every dimension but `axis`."""
    return torch.linalg.vector_norm(W, dim=[d for d in range(W.dim()) if d != axis])


def gain_of(m: Tensor, norm: Tensor) -> Tensor:
    """Return m / norm, 0 where the norm is 0."""
    there = norm > 0
    return torch.where(there, m / torch.where(there, norm, 1.0), 0.0)


@register("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(Modifier):
    """Weight-decomposed adaptation (arXiv 2402.09353) of an additive method.

    Args:
        of: the additive method whose delta gets a magnitude, such as `LoRA(r=8)` or `VeRA()` (DVoRA).
        targets, layers, exclude, train_modules: default: those of `of`.

    Example:
        >>> import slimtune as st
        >>> st.DoRA(of=st.LoRA(r=16)).of.r
        16
    """

    of: Spec = field(default_factory=LoRA)

    def check(self, site: Site) -> list[str]:
        wrong = super().check(site)
        if site.kind.name in {"experts", "attention"} or site.port != "weight":
            wrong.append(f"DoRA's magnitude is not defined on {site.kind.name} weights")
        if getattr(self.of, "up_bias", False):
            wrong.append("DoRA rescales weights only: set up_bias=False inside it")
        return wrong

    def build(self, site: Site) -> DoRAOp:
        op = self.inner().build(site)
        if not isinstance(op, Additive):
            raise SpecError(
                f"DoRA modifies methods that add to the weight; {self.of.method} does not", where=str(site), hint="st.DoRA(of=st.LoRA(r=8))"
            )
        return DoRAOp(site, op)
