"""What weights become when adapters are merged into them: the values alone, whoever installs or writes them.

The merged weight is computed in float32 (float64 on a float64 base). Where the base is finite the merged value is, in the type that it will be
kept in, or nothing is merged: `check_finite`. In half precision float32 is twice the size, so where rows of a weight need no others they are
computed and rounded in small groups: a merge of one weight takes the memory of that weight, not of five.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, MergeError
from slimtune.core.fold import Chain, members
from slimtune.core.host import Slot
from slimtune.core.op import Op, affine
from slimtune.core.plan import NameLink
from slimtune.core.state import State
from slimtune.ports.effective import effective, effective_bias


def merged_sites(model: nn.Module, links: list[NameLink]) -> list[tuple[nn.Module, str, Chain]]:
    """Return (module, param, chain) of every weight that the links change."""
    found = []
    for _, module in model.named_modules():
        slot = module._modules.get("slim")
        if isinstance(slot, Slot):
            for param in slot.kind.names(module):
                chain = slot.chain(links, param)
                if chain:
                    found.append((module, param, chain))
    return found


Seen = Callable[[Tensor, Tensor, Tensor], None]  # (rows before, merged, merged and rounded)


def merged_values(module: nn.Module, param: str, chain: Chain, seen: Seen | None = None) -> tuple[Tensor | None, Tensor | None]:
    """Return the merged (weight, bias) of one site in canonical shape, None where a value does not change.

    A weight in half precision whose ops act `by_rows` comes rounded already, a few rows at a time; others in the type they were computed in.

    Args:
        seen: told of the rows that were rounded here.

    Raises:
        MergeError: a value would be NaN or infinite where the base's is not.
    """
    slot: Slot = module._modules["slim"]  # type: ignore[assignment]
    ops = [member for link in chain for op, _ in link for member in members(op)]
    with torch.no_grad():
        W, old = slot.kind.read(module, param), slot.kind.bias(module, param)
        work = W.dtype if W.dtype == torch.float64 else torch.float32
        if _by_rows(module, param, W, chain):
            rounded = _rounded(W, chain, module, seen)
            if rounded is not None:
                new = effective_bias(None if old is None else old.to(work), chain) if any(hasattr(op, "bias") for op in ops) else None
                if new is not None:
                    check_finite(old, new, W.dtype, f"{slot.path}.bias ({type(module).__name__})")
                return rounded, new
        new_weight, new_bias = effective(W.to(work), None if old is None else old.to(work), chain, module)
    weight = new_weight if any(hasattr(op, "weight") for op in ops) else None
    bias = new_bias if any(hasattr(op, "bias") for op in ops) else None
    kept = module._parameters.get(param)
    for name, before, after in ((param, W, weight), ("bias", old, bias)):
        if after is not None:
            dtype = kept.dtype if kept is not None and kept.is_floating_point() else after.dtype
            check_finite(before, after, dtype, f"{slot.path}.{name} ({type(module).__name__})")
    return weight, bias


def _by_rows(module: nn.Module, param: str, W: Tensor, chain: Chain) -> bool:
    """Tell whether a weight is kept as it is read, in half precision, and can be made a few rows at a time."""
    kept, entries = module._parameters.get(param), [op for link in chain for op, _ in link]
    if kept is None or W.dtype not in (torch.float16, torch.bfloat16) or kept.dtype != W.dtype or W.is_meta or type(W) not in (Tensor, nn.Parameter):
        return False
    changing = [op for op in entries if hasattr(op, "weight")]
    return bool(changing) and all(isinstance(op, Op) and op.by_rows() for op in changing)


def _rounded(W: Tensor, chain: Chain, module: nn.Module, seen: Seen | None) -> Tensor | None:
    """Return the merged weight in the type of W, or None if not all of it is finite, which is for the whole weight to explain."""
    made = torch.empty_like(W, requires_grad=False)
    n = max(32, -(-W.shape[0] // 64) // 32 * 32)  # rows at a time
    for first in range(0, W.shape[0], n):
        at = slice(first, min(first + n, W.shape[0]))
        exact, _ = effective(W[at].to(torch.float32), None, chain, module, at)
        made[at].copy_(exact)
        if seen is not None:
            seen(W[at], exact, made[at])
        del exact  # or it would be there beside the next
    low, high = torch.aminmax(made)
    return made if math.isfinite(low) and math.isfinite(high) else None


def check_finite(before: Tensor | None, after: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise if a merged value is not finite, once it is kept in `dtype`, where what was there before is.

    Raises:
        MergeError: with the number of such values.
    """
    if after.is_meta or not after.numel():
        return
    low, high = (float(v) for v in torch.aminmax(after))  # NaN comes through; no temporary as large as the weight
    if math.isfinite(low) and math.isfinite(high) and max(-low, high) <= torch.finfo(dtype).max:
        return
    bad = ~after.to(dtype).isfinite()
    if before is not None:
        bad &= before.isfinite()
    if count := int(bad.sum()):
        kind = "NaN or infinite" if not bool(after.isfinite().all()) else f"too large for {str(dtype).removeprefix('torch.')}"
        raise MergeError(
            f"{count:,} of {after.numel():,} merged values would be {kind}, so nothing is merged",
            where=where,
            hint="an adapter in use holds NaN, infinity or huge values: load the last good checkpoint of it"
            if "NaN" in kind
            else "lower its weight in the merge, as in st.merge(model, {name: 0.5}), or load the base in float32",
        )


def check_affine(model: nn.Module, state: State, links: list[NameLink]) -> None:
    """Raise unless every op of the links has an exact form on the weights.

    Raises:
        CapabilityError: naming the method, the first site and the reason.
    """
    for name in {n for link in links for n, _ in link}:
        adapter = state.adapter(name)
        for (path, _), op in adapter.ops.items():
            if not affine(op):
                raise CapabilityError(
                    f"{name!r} cannot be merged: {type(op).__name__} is no affine map of its input, so no weight equals it",
                    where=f"{path} (method {op.method})",
                    hint="keep it unmerged; st.methods() shows which methods merge",
                )
