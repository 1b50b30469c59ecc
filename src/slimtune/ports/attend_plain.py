"""nn.MultiheadAttention with extra keys and values [p, heads, width] in front of those of the tokens (port "attention").

torch's function of attention takes one learned key at most, and only before its projection, so the formula stands here once more:
softmax(q [K; k]^T / sqrt(width) + masks) [V; v]. Returned weights are those of the tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.core.errors import SiteError

Affine = tuple[Tensor, Tensor | None]


def attend_plain(
    host: Any, pair: tuple[Tensor, Tensor], maps: tuple[Affine, ...], query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool, average: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attend, sequence first.

    Args:
        pair: keys and values in front.
        maps: weight and bias of the projections of query, key, value, and output.
        query, key, value: [T, N, e], [S, N, *], or without N.
        key_padding_mask, attn_mask: as nn.MultiheadAttention takes them; true = hidden.

    Raises:
        SiteError: the module adds keys of its own.
    """
    if host.bias_k is not None or host.add_zero_attn:
        what = "add_bias_kv and add_zero_attn leave no place for more keys and values"
        raise SiteError(what, where=host.slim.path, hint="leave it out with exclude=")
    flat = query.dim() == 2
    if flat:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (T, N, _), S, H, p = query.shape, key.shape[0], host.num_heads, pair[0].shape[0]

    def heads(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(t, weight, bias).view(t.shape[0], N, H, -1).permute(1, 2, 0, 3)  # [S, N, e] -> [N, H, S, width]

    q, k, v = (heads(t, *m) for t, m in zip((query, key, value), maps, strict=False))
    K, V = (t.to(k.dtype).transpose(0, 1).expand(N, -1, -1, -1) for t in pair)  # [p, H, width] -> [N, H, p, width]
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = _added(attn_mask, q).view(-1, 1 if attn_mask.dim() == 2 else H, T, S)
    if key_padding_mask is not None:
        hidden = _added(key_padding_mask, q)[:, None, None, :]
        mask = hidden if mask is None else mask + hidden
    if mask is not None:
        mask = F.pad(mask, (p, 0))  # nothing hides the prefix
    k, v, drop = torch.cat([K, k], 2), torch.cat([V, v], 2), host.dropout if host.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        shares = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), drop)
        y, weights = shares @ v, shares[..., p:]
        weights = weights.mean(1) if average else weights
        weights = weights.squeeze(0) if flat else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
    y = F.linear(y.permute(2, 0, 1, 3).reshape(T, N, -1), *maps[3])
    return (y.squeeze(1) if flat else y), weights


def _added(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(like.dtype)
