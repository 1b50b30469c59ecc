"""Body: the module of a transformers model that turns embedded tokens into hidden states; virtual tokens go in front of it.

It is found by structure: the innermost modules that take input_ids or inputs_embeds and an attention_mask and own token embeddings. Heads,
labels and losses lie outside of it, so they never see a virtual token. In an encoder-decoder the encoder's body is meant.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimtune.core.errors import TargetError
from slimtune.core.mixing import base_class

NEEDS = {"input_ids", "inputs_embeds", "attention_mask"}
# Arguments that hold something for each token and cannot be made up for a virtual one, or a state that is none of keys and values.
FOREIGN = {
    "per_layer_inputs": "it embeds every token once more for each layer",
    "mems": "it keeps hidden states between calls",
    "cache_params": "it is recurrent and keeps its state in cache_params",
}
# How configurations name the size of a table of absolute positions (the others: Whisper, LED).
LENGTHS = ("max_position_embeddings", "max_target_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
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
    """

    names: tuple[str, ...]
    causal: bool
    positions: bool
    from_mask: bool
    absolute: bool
    start: int
    limit: int
    width: int


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Return the names of the parameters of a class's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def is_body(module: nn.Module) -> bool:
    """Tell whether a module takes embedded tokens (a whole model with a head does, too)."""
    return hasattr(module, "get_input_embeddings") and set(parameters_of(base_class(module))) >= NEEDS


def embeddings_of(module: Any) -> nn.Module | None:
    """Return the token embeddings of a body, or None."""
    try:
        table = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Module) and isinstance(table._parameters.get("weight"), nn.Parameter) else None


def study(module: Any) -> Body:
    """Work out the facts of a body."""
    names = parameters_of(base_class(module))
    flags = [m.__dict__["is_causal"] for m in module.modules() if "is_causal" in m.__dict__]
    table = embeddings_of(module)
    limit, start, from_mask = _position_table(module, table)
    return Body(
        names=names,
        causal=any(flags) if flags else "past_key_values" in names,
        positions="position_ids" in names,
        from_mask=from_mask,
        absolute=limit > 0,
        start=start,
        limit=limit,
        width=int(table.weight.shape[-1]) if table is not None else 0,  # type: ignore[union-attr, index, arg-type]
    )


def _position_table(module: Any, tokens: nn.Module | None) -> tuple[int, int, bool]:
    """Return (positions, the first one, whether it counts by the mask) of a table of absolute positions outside the blocks."""
    sizes = {getattr(module.config, name) for name in LENGTHS if hasattr(module.config, name)}
    for path, m in module.named_modules():
        if not isinstance(m, nn.Embedding) or m is tokens or any(part.isdigit() for part in path.split(".")):
            continue
        offset = int(m.__dict__.get("offset", 0))
        if m.num_embeddings - offset in sizes:
            start = 0 if m.padding_idx is None or offset else m.padding_idx + 1
            return m.num_embeddings - offset - start, start, "attention_mask" in parameters_of(base_class(m))
    return 0, 0, False


def bodies(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> innermost body."""
    from slimtune.core.placing import base_modules

    found = {path: m for path, m in base_modules(model).items() if is_body(m)}
    return {p: m for p, m in found.items() if not any(q != p and (q.startswith(f"{p}.") or not p) for q in found)}


def pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return (encoder, decoder) of every encoder-decoder inside a model."""
    found: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if not hasattr(config, "is_encoder_decoder") or not config.is_encoder_decoder or not hasattr(module, "get_decoder"):
            continue
        encoder, decoder = module.get_encoder(), module.get_decoder()  # type: ignore[operator]
        apart = isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module) and encoder is not decoder
        if apart and module not in (encoder, decoder) and not any(encoder is e for e, _ in found):
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
