"""Body: the module of a transformers model that turns embedded tokens into hidden states; virtual tokens go in front of it.

It is found by structure: the innermost modules that take input_ids or inputs_embeds and an attention_mask and own token embeddings. Heads,
labels and losses lie outside of it, so they never see a virtual token. In an encoder-decoder the encoder's body is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimtune.core.errors import TargetError
from slimtune.core.mixing import base_class
from slimtune.ports import transformers_internals as internals
from slimtune.ports.transformers_internals import takes_embedded_tokens as is_body
from slimtune.ports.transformers_internals import token_embeddings as embeddings_of

# Arguments that hold something for each token and cannot be made up for a virtual one, or a state that is none of keys and values.
FOREIGN = {
    "per_layer_inputs": "it embeds every token once more for each layer",
    "mems": "it keeps hidden states between calls",
}
HINT = 'prefix tuning needs no token embeddings; for a module of your own: targets="its.path", width=d'


@dataclass(frozen=True)
class Body:
    """What the fold must know of one body.

    Attributes:
        names: parameters of its forward, in order.
        causal: tokens see only what stands before them.
        positions: it takes position_ids.
        from_mask: left to itself it counts positions by the mask.
        absolute: it has a table of absolute positions.
        start: its first position (RoBERTa's padding_idx + 1).
        limit: how many positions the table has; 0 = no table.
        width: d of its token embeddings.
        tried: what has been compared with the bare base on it (see `ports.trial`).
    """

    names: tuple[str, ...]
    causal: bool
    positions: bool
    from_mask: bool
    absolute: bool
    start: int
    limit: int
    width: int
    tried: set[str] = field(default_factory=set, compare=False)


def study(module: Any) -> Body:
    """Work out the facts of a body."""
    table = embeddings_of(module)
    limit, start, from_mask = internals.absolute_positions(module, table)
    names = internals.parameters_of(base_class(module))
    return Body(
        names=names,
        causal=internals.is_causal(module),
        positions="position_ids" in names,
        from_mask=from_mask,
        absolute=limit > 0,
        start=start,
        limit=limit,
        width=int(table.weight.shape[-1]) if table is not None else 0,  # type: ignore[union-attr, index, arg-type]
    )


def bodies(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> innermost body."""
    from slimtune.core.placing import base_modules

    found = {path: m for path, m in base_modules(model).items() if is_body(m)}
    return {p: m for p, m in found.items() if not any(q != p and (q.startswith(f"{p}.") or not p) for q in found)}


def pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return (encoder, decoder) of every encoder-decoder inside a model."""
    found: list[tuple[nn.Module, nn.Module]] = []
    for encoder, decoder in internals.encoder_decoders(model):
        if not any(encoder is e for e, _ in found):
            found.append((encoder, decoder))
    return found


def prompted(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the bodies that virtual tokens go to by themselves, and the decoders that read what these give.

    Raises:
        TargetError: there is none, with the reason.
    """
    found = bodies(model)
    readers: dict[str, nn.Module] = {}
    for encoder, decoder in pairs(model):
        inside, reading = set(encoder.modules()), set(decoder.modules())
        if not any(m in inside for m in found.values()):
            raise TargetError(
                "virtual tokens have no place here: the encoder reads no token embeddings", where=f"{type(encoder).__name__}", hint=HINT
            )
        readers |= {p: m for p, m in found.items() if m in reading}
    found = {p: m for p, m in found.items() if p not in readers and embeddings_of(m) is not None}
    if not found:
        raise TargetError(
            "virtual tokens have no place here: no part of the model takes both inputs_embeds and an attention_mask",
            where=f"{type(model).__name__}",
            hint=HINT,
        )
    return found, readers


__all__ = ["FOREIGN", "Body", "bodies", "embeddings_of", "is_body", "pairs", "prompted", "study"]
