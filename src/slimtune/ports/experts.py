"""3-D expert weights of transformers 5 (Mixtral, Qwen-MoE, DeepSeek, gpt-oss, ...): E experts in one nn.Parameter [E, b, a] (or [E, a, b]).

    A [E, r, a]   B [E, b, r]   delta[e] = B[e] A[e]

The base's forward has no place between its two products, so this kind runs the experts itself: (token, expert) pairs are sorted by expert, and
base and ops multiply each expert's pairs with that expert's matrices. No dense delta of all experts is ever formed. Router, top-k, biases and the
gate function are the base's own. Ops receive the pairs as their input x [S, a], sorted, and a `Routed` in place of the host, which carries
which rows belong to which expert to `down`, `up` and `apply`.

Tokens are the flattened batch, so rows= gives each row of a plan its block of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimtune.core.errors import SiteError
from slimtune.core.fold import Chain, entering, leaving, narrow, put, take
from slimtune.core.kind import Kind
from slimtune.core.plan import Plan
from slimtune.ports.effective import of_param
from slimtune.ports.grouped import each
from slimtune.ports.install import install

STATES, INDEX, WEIGHTS = ("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Routed:
    """What ops get in place of their host: the module, and where each expert's pairs end.

    Attributes:
        module: the host.
        slim: the host's slot.
        ends: [E], where the pairs of each expert end.
        experts: number of experts E.
    """

    def __init__(self, module: Any, ends: Tensor) -> None:
        self.module, self.slim, self.ends, self.experts = module, module.slim, ends, module.num_experts


class ExpertsKind(Kind):
    """Classes made with transformers' `use_experts_implementation`."""

    name = "experts"
    ports = ("weight", "output")
    params = ("gate_up_proj", "up_proj", "down_proj")
    rank_axis = 1

    def fits(self, module: Any) -> bool:
        own = module.__dict__
        return "is_transposed" in own and "has_gate" in own and "num_experts" in own and "down_proj" in module._parameters

    def problem(self, module: Any) -> str:
        dtypes = {module._parameters[p].dtype for p in self.names(module)}
        if not dtypes <= set(FLOATS):
            return f"expert weights of type {', '.join(map(str, dtypes))} cannot be adapted: only float weights"
        if module.__dict__.get("_is_expert_parallel", False):
            return "experts that are spread over several processes cannot be adapted"
        implementation = getattr(module.config, "_experts_implementation", None)
        if implementation not in {None, "eager", "batched_mm", "grouped_mm"}:
            return f'experts run by {implementation!r} cannot be adapted: model.set_experts_implementation("grouped_mm") first'
        return ""

    def names(self, module: Any) -> tuple[str, ...]:
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")

    def read(self, module: Any, param: str) -> Tensor:
        W: Tensor = module._parameters[param]
        return W.transpose(1, 2) if module.is_transposed else W

    def shape(self, module: Any, param: str) -> tuple[int, ...]:
        return tuple(self.read(module, param).shape)

    def widths(self, module: Any, param: str) -> tuple[int, int]:
        _, b, a = self.shape(module, param)
        return a, b

    def bias(self, module: Any, param: str) -> Tensor | None:
        return None  # biases of experts are not adapted

    def write(self, module: Any, param: str, weight: Tensor | None, bias: Tensor | None) -> Callable[[], None]:
        if weight is not None and module.is_transposed:
            weight = weight.transpose(1, 2).contiguous()
        return install(module, **{param: weight})

    # ---- maps over pairs sorted by expert -----------------------------------------------------------------------
    def apply(self, x: Tensor, weight: Tensor, host: Any) -> Tensor:
        return each(x, weight, host.ends)

    def apply_op(self, x: Tensor, op: Any, host: Any) -> Tensor:
        """Apply an op's delta expert by expert, where it can give one expert's delta at a time (`delta_of(e)`)."""
        if not hasattr(op, "delta_of"):
            return self.apply(x, op.delta(), host)
        ends = host.ends.tolist()
        spans = [(e, ends[e - 1] if e else 0, ends[e]) for e in range(host.experts)]
        parts = [x[i:j] @ op.delta_of(e).to(x.dtype).t() for e, i, j in spans if j > i]
        return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], op.shape[1])])

    def factor_shapes(self, module: Any, param: str, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        E, b, a = self.shape(module, param)
        return (E, r, a), (E, b, r)

    def matrices(self, weight: Tensor, module: Any | None) -> Tensor:
        return weight

    def pack(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return A, B

    def beside(self, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([A, A2], 1), torch.cat([B, B2], 2)

    def compose(self, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.bmm(B, A)  # [E, b, r] @ [E, r, a]

    def down(self, x: Tensor, A: Tensor, host: Any) -> Tensor:
        return each(x, A, host.ends)

    def up(self, h: Tensor, B: Tensor, host: Any) -> Tensor:
        return each(h, B, host.ends)

    # ---- the forward --------------------------------------------------------------------------------------------
    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x, index, weights = _arguments(host, args, kwargs)
        chain = plan.uniform(host.slim)
        if chain is not None:
            return self._run(host, chain, x, index, weights)
        out = torch.zeros_like(x)
        plan = plan.blocks()
        selectors = plan.selectors(x.shape[0], x.device, host.slim.path, type(host).__name__)
        for rows, (_, links) in zip(selectors, plan.segments, strict=True):
            part = take(x, rows, 0), take(index, rows, 0), take(weights, rows, 0)
            chain = host.slim.chain(links)
            out = put(out, rows, self._run(host, chain, *part) if chain else base(*part), 0)
        return out

    def _run(self, host: Any, chain: Chain, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the experts' output for tokens x [n, hidden] with top-k index and weights [n, K]."""
        n, K = index.shape
        expert, order = index.reshape(-1).sort(stable=True)  # pairs, token-major, then sorted by expert
        ends = torch.searchsorted(expert, torch.arange(host.num_experts, device=x.device), right=True)
        token = order // K
        up_name, down_name = self.names(host)
        routed = Routed(host, ends)
        at = expert.clamp(max=host.num_experts - 1)  # rows of no expert weigh nothing

        h = self._product(routed, up_name, of_param(chain, up_name), x[token], at)
        h = host._apply_gate(h) if host.has_gate else host.act_fn(h)
        h = self._product(routed, down_name, of_param(chain, down_name), h, at)
        if getattr(host, "has_post_expert_norm", False):  # later versions of transformers only
            h = host.post_expert_norm(h)
        h = h * weights.reshape(-1)[order][:, None]
        after = narrow(chain, lambda op: op.port == "output")
        if getattr(host.config, "_experts_implementation", None) in {None, "eager"}:
            y = torch.zeros_like(x).index_add_(0, token, h.to(x.dtype))  # the sum in the base's own order
        else:
            back = torch.empty_like(order).index_copy(0, order, torch.arange(n * K, device=x.device))
            y = h[back].view(n, K, -1).sum(1).to(x.dtype)
        return leaving(host, [x] * len(after), y, after)

    def _product(self, routed: Routed, param: str, chain: Chain, x: Tensor, at: Tensor) -> Tensor:
        """Return the product of one weight with the pairs, its bias and its ops included."""
        host: Any = routed.module
        seen, entered = entering(routed, x, chain)  # type: ignore[arg-type]
        y = each(entered, self.read(host, param), routed.ends)
        if host.has_bias:
            y = y + host._parameters[f"{param}_bias"][at]
        return leaving(routed, seen, y, chain)  # type: ignore[arg-type]


class UnknownExpertsKind(ExpertsKind):
    """Modules with 3-D weights, one matrix for each of `num_experts`, whose forward nobody here knows: refused by name."""

    def fits(self, module: Any) -> bool:
        return bool(self.names(module))

    def names(self, module: Any) -> tuple[str, ...]:
        E = module.__dict__.get("num_experts")
        return tuple(n for n, p in module._parameters.items() if E is not None and p is not None and p.dim() == 3 and p.shape[0] == E)

    def problem(self, module: Any) -> str:
        return f"how {type(module).__name__} uses its 3-D weights {', '.join(self.names(module))} is not known, so they cannot be adapted"

    def read(self, module: Any, param: str) -> Tensor:
        return module._parameters[param]  # type: ignore[no-any-return]

    def forward(
        self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        raise SiteError(self.problem(host), where=host.slim.path)


def _arguments(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden states, chosen experts, their weights) of a call, however they were passed."""
    found = list(args[:3])
    for names in (STATES, INDEX, WEIGHTS)[len(found) :]:
        given = [kwargs[name] for name in names if name in kwargs]
        if not given:
            raise SiteError(f"an adapted {type(host).__name__} was called without {names[0]}", where=host.slim.path)
        found.append(given[0])
    x, index, weights = found
    if x.dim() != 2:
        raise SiteError(f"expected tokens [n, hidden], got {list(x.shape)}", where=f"{host.slim.path} ({type(host).__name__})")
    return x, index, weights
