"""MoRA: y += decompress(M compress(x)) with one square matrix M [r', r'], r' = floor(sqrt((a + b) r)): a high-rank update of a LoRA's size.

Paper: arXiv 2405.12130. Sharing (eq. 6): the a inputs are summed in r' groups, the r' outputs repeated: dW[o, i] = M[o mod r', i mod r'].
Rotation (eq. 9): x is cut into chunks of r', chunk i is rotated by the angles i theta_k, theta_k = 10000^(-2k/r') (as rotary positions), and M
maps each: chunk t of the longer side joins chunk t mod n of the shorter, which is the paper's form where a = b.
Cost: r'^2 parameters, no more than LoRA's r (a + b); 2 n r'^2 FLOPs (rotation: times the chunks). Linear, so it merges. M starts at zero.
Choose it when the task is to remember much that is new, where a low rank is the bottleneck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.op import Additive, cast
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec


class MoRAOp(Additive):
    """M [r', r'] by sharing."""

    roles = {"M": "core"}
    linear_in = {"M": 0.0}

    def __init__(self, site: Site, side: int) -> None:
        super().__init__(site)
        self.side, self.a, self.b = side, site.a, site.b
        self.M = nn.Parameter(torch.zeros(side, side, device=site.device, dtype=site.dtype))

    def delta(self) -> Tensor:
        o, i = torch.arange(self.b, device=self.M.device) % self.side, torch.arange(self.a, device=self.M.device) % self.side
        return self.M[o][:, i]

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        chunks = -(-self.a // self.side)
        padded = F.pad(x, (0, chunks * self.side - self.a)).unflatten(-1, (chunks, self.side))
        h = F.linear(padded.sum(-2), cast(self.M, y))  # [n, r'] @ [r', r'] -> [n, r']
        return h.repeat(*[1] * (h.dim() - 1), -(-self.b // self.side))[..., : self.b]


class RotatedMoRAOp(MoRAOp):
    """M [r', r'], r' even, applied to rotated chunks."""

    def _pairs(self) -> list[tuple[int, int]]:
        """Return (output chunk, input chunk) of every application of M."""
        n_in, n_out = -(-self.a // self.side), -(-self.b // self.side)
        return [(t % n_out, t % n_in) for t in range(max(n_in, n_out))]

    def _angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [chunks, r' / 2]."""
        chunks = torch.arange(-(-self.a // self.side), device=like.device, dtype=torch.float64)
        theta = 10000.0 ** (-2.0 * torch.arange(self.side // 2, device=like.device, dtype=torch.float64) / self.side)
        angle = chunks[:, None] * theta
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)

    def delta(self) -> Tensor:
        n_in, n_out = -(-self.a // self.side), -(-self.b // self.side)
        cos, sin = self._angles(self.M)
        left, right = self.M[:, 0::2], self.M[:, 1::2]  # M P_i, where P_i turns each pair of neighbours
        blocks: dict[tuple[int, int], Tensor] = {}
        for j, i in self._pairs():
            blocks[j, i] = torch.stack([left * cos[i] + right * sin[i], right * cos[i] - left * sin[i]], -1).flatten(-2)
        zero = torch.zeros_like(self.M)
        rows = [torch.cat([blocks.get((j, i), zero) for i in range(n_in)], 1) for j in range(n_out)]
        return torch.cat(rows, 0)[: self.b, : self.a]

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        n_in, n_out = -(-self.a // self.side), -(-self.b // self.side)
        chunks = F.pad(x, (0, n_in * self.side - self.a)).unflatten(-1, (n_in, self.side))
        cos, sin = self._angles(x)
        even, odd = chunks[..., 0::2], chunks[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        h = F.linear(turned, cast(self.M, y))  # [n, chunks, r'] @ [r', r']
        if n_in >= n_out:  # input chunk t adds to output chunk t mod n_out
            h = F.pad(h, (0, 0, 0, -n_in % n_out)).unflatten(-2, (-1, n_out)).sum(-3)
        else:
            h = h.repeat(*[1] * (h.dim() - 2), -(-n_out // n_in), 1)[..., :n_out, :]
        return h.flatten(-2)[..., : self.b]


@register("mora")
@dataclass(frozen=True, kw_only=True)
class MoRA(Spec):
    """High-rank updating with one square matrix per layer (arXiv 2405.12130).

    Args:
        r: rank of the LoRA whose number of parameters is not exceeded.
        form: "rotation" (eq. 9, the paper's choice for small r) or "sharing" (eq. 6, for large r).

    Example:
        >>> import slimtune as st
        >>> st.MoRA(r=8).form
        'rotation'
    """

    r: int = 8
    form: str = "rotation"

    def problems(self) -> list[str]:
        wrong = [] if self.r >= 1 else [f"r must be at least 1, not {self.r}"]
        return wrong if self.form in {"rotation", "sharing"} else [*wrong, f'form must be "rotation" or "sharing", not {self.form!r}']

    def check(self, site: Site) -> list[str]:
        return [] if site.kind.name == "linear" else [f"MoRA's square matrix fits linear layers only, not {site.kind.noun}"]

    def build(self, site: Site) -> MoRAOp:
        side = max(2, math.isqrt((site.a + site.b) * self.r))
        return MoRAOp(site, side) if self.form == "sharing" else RotatedMoRAOp(site, side - side % 2)
