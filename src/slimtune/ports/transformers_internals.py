"""Where slimtune stands on internals of transformers: everything it assumes of them, one function per assumption.

Nothing else in the package reads a private name of transformers for bodies, caches, masks, attention or generation. Each function has one test
named after what it assumes (tests/unit/test_transformers_internals.py), and `ports.trial` compares the whole with the bare base on the user's
own model at first use, so that a version or a model that behaves otherwise is refused by name.

    body         what takes embedded tokens, whether it is causal, where its table of absolute positions is
    cache        its name among arguments and results, how many places it holds and has room for
    attention    one registry that every layer asks for its function
    generation   the methods that `ports.root` overrides
    blocks       where checkpoint functions are kept
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from slimtune.core.errors import SiteError
from slimtune.core.mixing import base_class

# Oldest and newest minor release that the whole suite passes on. Others are as welcome, but must pass `ports.trial` on the model itself.
TESTED = ((5, 15), (5, 24))
# Names of a cache, the newest first: an argument of forwards and of generate, a field of results. 5.24 calls all of them `cache`.
CACHE = ("cache", "past_key_values", "cache_params")
# Methods of generating models that `ports.root.Rooted` stands in front of, with the arguments it reads.
GENERATION = {
    "_prepare_cache_for_generation": ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    "prepare_inputs_for_generation": ("attention_mask",),
}
CHECKPOINT = "_gradient_checkpointing_func"
# How configurations name the size of a table of absolute positions (the others: Whisper, LED).
LENGTHS = ("max_position_embeddings", "max_target_positions", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
EMBEDDED = {"input_ids", "inputs_embeds", "attention_mask"}


def version() -> str:
    """Return the version of transformers, "" without it."""
    import sys

    found = sys.modules.get("transformers")
    return str(found.__version__) if found is not None else ""


def is_tested(number: str) -> bool:
    """Tell whether the suite has been run on a version of transformers."""
    parts = number.split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()) or not parts[-1].isdigit():
        return False  # also releases to come: 5.25.0.dev0
    return TESTED[0] <= (int(parts[0]), int(parts[1])) <= TESTED[1]


def install_hint() -> str:
    """Say which versions to install."""
    (a, b), (c, d) = TESTED
    return f'pip install "transformers>={a}.{b},<{c}.{d + 1}", which slimtune was tested with'


# ---- the body --------------------------------------------------------------------------------------------------------
@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Return the names of the parameters of a class's forward, through the decorators of transformers."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


@functools.cache
def takes_more(cls: type) -> bool:
    """Tell whether the forward of a class takes arguments that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(cls.forward).parameters.values())  # type: ignore[attr-defined]


def takes_embedded_tokens(module: nn.Module) -> bool:
    """Tell whether a module takes embedded tokens (a whole model with a head does, too)."""
    return hasattr(module, "get_input_embeddings") and set(parameters_of(base_class(module))) >= EMBEDDED


def token_embeddings(module: Any) -> nn.Module | None:
    """Return the token embeddings of a body, or None."""
    try:
        table = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Module) and isinstance(table._parameters.get("weight"), nn.Parameter) else None


def is_causal(module: nn.Module) -> bool:
    """Tell whether tokens see only what stands before them: layers say so, and what says nothing is causal if it keeps a cache."""
    flags = [m.__dict__["is_causal"] for m in module.modules() if "is_causal" in m.__dict__]
    return any(flags) if flags else any(name in parameters_of(base_class(module)) for name in CACHE)


def absolute_positions(module: Any, tokens: nn.Module | None) -> tuple[int, int, bool]:
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


def encoder_decoders(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (encoder, decoder) of every module whose configuration says that it has both."""
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if not hasattr(config, "is_encoder_decoder") or not config.is_encoder_decoder or not hasattr(module, "get_decoder"):
            continue
        encoder, decoder = module.get_encoder(), module.get_decoder()  # type: ignore[operator]
        if isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module) and encoder is not decoder and module not in (encoder, decoder):
            yield encoder, decoder


def main_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and value of the input whose rows are those of the batch, None where it is not among the arguments."""
    name = str(model.main_input_name)
    return name, kwargs.get(name, args[0] if args else None)


# ---- the cache -------------------------------------------------------------------------------------------------------
def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a forward or the results of one, or None."""
    if not isinstance(arguments, dict):
        return None
    fields = dict(arguments.items()) if type(arguments) is not dict else arguments  # asking a result for an old name makes it warn
    return next((fields[name] for name in CACHE if fields.get(name) is not None), None)


def cache_argument(module: nn.Module) -> str | None:
    """Return what the forward of a module calls its cache, None if it takes none."""
    names = parameters_of(base_class(module))
    return next((name for name in CACHE if name in names), None)


def places_held(cache: Any, layer: int = 0) -> int | Tensor:
    """Return how many places a cache holds (in one of its layers)."""
    own = getattr(cache, "self_attention_cache", cache)
    held = own.get_seq_length(layer)
    return held.clone() if isinstance(held, Tensor) else int(held)  # a static cache counts in place


def room_of(cache: Any) -> int:
    """Return how many places a cache can hold at most, -1 where it grows."""
    own = getattr(cache, "self_attention_cache", cache)
    if not getattr(own, "is_compileable", False):
        return -1  # what is made for its whole length can be compiled; others grow, whatever the windows of their layers
    ask = getattr(own, "get_max_length", None) or getattr(own, "get_max_cache_shape", None)
    return -1 if ask is None else int(ask())


def filled_cache(module: Any, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> Any:
    """Return a cache for one row that holds keys and values [p, heads, width] of each layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=module.config.get_text_config(decoder=True))
    for layer, (keys, values) in sorted(pairs.items()):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
    return cache


def is_recurrent(module: Any) -> bool:
    """Tell whether a body keeps a state instead of keys and values, so that its cache counts no places (Mamba, RWKV)."""
    name = cache_argument(module)
    if name != "cache":
        return name == "cache_params"
    from transformers import DynamicCache

    kinds = getattr(DynamicCache(config=module.config.get_text_config(decoder=True)), "is_linear", [])
    return bool(kinds) and all(kinds)


# ---- attention -------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=4096)
def asks_registry(cls: type) -> bool:
    """Tell whether the forward of a class takes its attention function from the registry: its code names `get_interface`."""
    forward = getattr(cls, "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return code is not None and "get_interface" in code.co_names


def intercept_attention(step: Callable[..., Any]) -> None:
    """Put `step(function, name, *its arguments)` behind the registry's answers, once per process.

    Raises:
        SiteError: this version of transformers has no such registry.
    """
    from transformers import AttentionInterface

    ask = getattr(AttentionInterface, "get_interface", None)
    if ask is None:
        raise SiteError(f"transformers {version()} has no registry that every attention layer asks", hint=install_hint())
    if getattr(ask, "slim", False):
        return

    @functools.wraps(ask)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(step, ask(self, attn_implementation, default), attn_implementation)

    get_interface.slim = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


# ---- generation ------------------------------------------------------------------------------------------------------
def generation_problem(model: Any) -> str:
    """Say which method that virtual tokens need is missing from a generating model or has other arguments, "" if none is."""
    for name, needed in GENERATION.items():
        method = getattr(base_class(model), name, None)
        names = () if method is None else tuple(inspect.signature(inspect.unwrap(method)).parameters)
        if method is None or not set(needed) <= set(names):
            return f"{type(model).__name__}.{name} is not there" if method is None else f"{type(model).__name__}.{name} takes {', '.join(names[1:])}"
    return ""


def default_masks(**kwargs: Any) -> Any:
    """Return the masks of a compiled forward, for a model without a method of its own."""
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate(**kwargs)


# ---- blocks ----------------------------------------------------------------------------------------------------------
def checkpointed(model: nn.Module) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield (holder, function) of every checkpoint function that transformers keeps on a model's blocks: holder[CHECKPOINT] is it."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINT)
        if function is not None:
            yield module.__dict__, function
