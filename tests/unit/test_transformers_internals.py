"""What slimtune assumes of transformers, one test for each assumption of `ports.transformers_internals`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from slimtune.ports import transformers_internals as internals
from slimtune.testing import zoo

IDS = torch.tensor([[5, 9, 14, 23]])


def test_the_version_that_runs_here_is_in_the_tested_range() -> None:
    assert internals.is_tested(transformers.__version__), "run the whole suite on it, then widen TESTED"
    (a, b), (c, d) = internals.TESTED
    assert internals.is_tested(f"{a}.{b}.0")
    assert internals.is_tested(f"{c}.{d}.7")
    for other in (f"{a}.{b - 1}.9", f"{c}.{d + 1}.0", f"{c}.{d}.0.dev0", "6.0.0", "", "main"):
        assert not internals.is_tested(other), other
    assert internals.version() == transformers.__version__


def test_forwards_show_their_parameters_through_decorators() -> None:
    names = internals.parameters_of(transformers.LlamaModel)
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"} <= set(names)
    assert names[0] == "input_ids"
    assert internals.takes_more(transformers.LlamaModel)


def test_a_body_takes_ids_embeddings_and_a_mask() -> None:
    model = zoo.llama()
    assert internals.takes_embedded_tokens(model.model)
    assert internals.takes_embedded_tokens(model)
    assert not internals.takes_embedded_tokens(model.model.layers[0])
    assert not internals.takes_embedded_tokens(zoo.vit())


def test_a_body_gives_its_token_embeddings() -> None:
    model = zoo.llama()
    table = internals.token_embeddings(model.model)
    with torch.no_grad():
        a, b = model.model(input_ids=IDS).last_hidden_state, model.model(inputs_embeds=table(IDS)).last_hidden_state  # type: ignore[misc]
    assert torch.equal(a, b)
    assert internals.token_embeddings(nn.Linear(2, 2)) is None


def test_layers_say_whether_they_are_causal() -> None:
    assert internals.is_causal(zoo.llama().model)
    assert internals.is_causal(zoo.bloom().transformer)
    assert not internals.is_causal(zoo.bert())
    t5 = zoo.t5()
    assert internals.is_causal(t5.decoder)
    assert not internals.is_causal(t5.encoder)


def test_a_table_of_absolute_positions_has_the_size_that_the_configuration_names() -> None:
    for name, path, offset in (("gpt2", "transformer", 0), ("roberta", "roberta", 1), ("bert", "bert", 0)):
        model = getattr(zoo, name)()
        body = model.get_submodule(path) if path in dict(model.named_modules()) else model
        limit, start, from_mask = internals.absolute_positions(body, internals.token_embeddings(body))
        config = body.config
        assert start == (config.pad_token_id + 1 if offset else 0)
        assert limit == config.max_position_embeddings - start
        assert not from_mask
    llama = zoo.llama().model
    assert internals.absolute_positions(llama, internals.token_embeddings(llama)) == (0, 0, False)


def test_encoder_decoders_give_both_stacks() -> None:
    model = zoo.bart()
    assert (model.model.encoder, model.model.decoder) in list(internals.encoder_decoders(model))
    assert not list(internals.encoder_decoders(zoo.llama()))


def test_the_main_input_has_a_row_for_each_row_of_the_batch() -> None:
    model = zoo.llama()
    assert internals.main_input(model, (IDS,), {}) == ("input_ids", IDS)
    assert internals.main_input(model, (), {"input_ids": IDS})[1] is IDS
    assert internals.main_input(model, (), {}) == ("input_ids", None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_cache_goes_in_and_out_under_a_known_name(name: str) -> None:
    model = getattr(zoo, name)()
    body = next(m for m in model.children() if internals.takes_embedded_tokens(m))
    argument = internals.cache_argument(body)
    assert argument in internals.CACHE[:2]
    with torch.no_grad():
        whole = body(IDS).last_hidden_state
        out = body(IDS[:, :3], use_cache=True)
        cache = internals.cache_in(out)
        assert cache is not None
        assert internals.cache_in({str(argument): cache}) is cache
        assert internals.cache_in({"past_key_values": cache}) is cache
        assert internals.cache_in((1, 2)) is None
        last = body(IDS[:, 3:], use_cache=True, **{str(argument): cache}).last_hidden_state
    assert torch.allclose(last, whole[:, 3:], atol=1e-5)
    assert internals.cache_argument(zoo.vit()) is None


def test_a_cache_counts_the_places_it_holds() -> None:
    model = zoo.gemma3()
    with torch.no_grad():
        cache = internals.cache_in(model.model(torch.cat([IDS, IDS], 1), use_cache=True))
    assert internals.places_held(cache) == 8
    assert internals.places_held(cache, 1) == 8
    t5 = zoo.t5()
    with torch.no_grad():
        both = internals.cache_in(t5(IDS, decoder_input_ids=IDS, use_cache=True))
    assert internals.places_held(both) == 4


def test_only_a_static_cache_has_an_end() -> None:
    config = zoo.gemma3().config
    assert internals.room_of(transformers.StaticCache(config=config, max_cache_len=17)) == 17
    assert internals.room_of(transformers.DynamicCache()) == -1
    assert internals.room_of(transformers.DynamicCache(config=config)) == -1  # though a layer's window has one


def test_a_cache_can_be_filled_by_hand() -> None:
    model = zoo.llama()
    config = model.config
    pair = torch.randn(3, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    cache = internals.filled_cache(model.model, dict.fromkeys(range(config.num_hidden_layers), (pair, pair)))
    assert internals.places_held(cache) == 3
    with torch.no_grad():
        model.model(IDS, use_cache=True, **{str(internals.cache_argument(model.model)): cache})
    assert internals.places_held(cache) == 7


def test_a_recurrent_body_counts_no_places() -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=99, state_size=4)
    assert internals.is_recurrent(transformers.MambaModel(config))
    assert not internals.is_recurrent(zoo.llama().model)
    assert not internals.is_recurrent(zoo.bert())


def test_attention_layers_ask_one_registry() -> None:
    for name in ("llama", "gpt2", "bert", "t5", "bart", "modernbert"):
        asking = [m for m in getattr(zoo, name)().modules() if internals.asks_registry(type(m))]
        assert asking, name
    assert not internals.asks_registry(nn.Linear)
    seen: list[str] = []

    def step(function: Any, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(module, *args, **kwargs)

    asked = transformers.AttentionInterface.get_interface
    try:
        transformers.AttentionInterface.get_interface = inspect.unwrap(asked)  # type: ignore[method-assign]
        internals.intercept_attention(step)
        once = transformers.AttentionInterface.get_interface
        internals.intercept_attention(step)
        assert transformers.AttentionInterface.get_interface is once
        model = zoo.llama()
        for implementation in ("eager", "sdpa"):
            seen.clear()
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                model(IDS)
            assert seen == [implementation] * model.config.num_hidden_layers
    finally:
        transformers.AttentionInterface.get_interface = asked  # type: ignore[method-assign]


def test_attention_functions_get_heads_before_tokens() -> None:
    shapes: list[tuple[int, ...]] = []
    asked = transformers.AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        own = asked(self, name, default)

        def look(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            shapes.extend(tuple(t.shape[:3]) for t in (query, key, value))
            return own(module, query, key, value, attention_mask, **kwargs)

        return look

    model = zoo.llama()
    try:
        transformers.AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
        with torch.no_grad():
            model(IDS)
    finally:
        transformers.AttentionInterface.get_interface = asked  # type: ignore[method-assign]
    heads, few = model.config.num_attention_heads, model.config.num_key_value_heads
    assert set(shapes) == {(1, heads, 4), (1, few, 4)}


def test_generating_models_prepare_their_cache_and_inputs_in_known_methods() -> None:
    assert internals.generation_problem(zoo.llama()) == ""
    assert internals.generation_problem(zoo.t5()) == ""

    class Renamed(transformers.LlamaForCausalLM):
        def _prepare_cache_for_generation(self, config: Any, kwargs: Any) -> None: ...

    assert "takes config, kwargs" in internals.generation_problem(Renamed(zoo.llama().config))
    assert "is not there" in internals.generation_problem(zoo.bert())


def test_masks_for_compiled_forwards_come_from_one_function() -> None:
    model = zoo.llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=9)
    names = inspect.signature(inspect.unwrap(importable())).parameters
    argument = next(name for name in internals.CACHE if name in names)
    given: dict[str, Any] = {"config": model.config, "inputs_embeds": torch.empty(1, 4, 0), "attention_mask": torch.ones(1, 4).long()}
    if "cache_position" in names:
        given["cache_position"] = torch.arange(4)
    mask = internals.default_masks(**given, **{argument: cache})
    assert mask is None or mask.shape[-1] in (4, 9)


def importable() -> Any:
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate


def test_blocks_keep_their_checkpoint_function() -> None:
    model = zoo.llama()
    assert not list(internals.checkpointed(model))
    model.gradient_checkpointing_enable()
    held = list(internals.checkpointed(model))
    assert len(held) >= model.config.num_hidden_layers
    assert all(isinstance(function, functools.partial) or callable(function) for _, function in held)
    calls = []
    for holder, function in held:
        holder[internals.CHECKPOINT] = lambda *a, function=function, **k: calls.append(1) or function(*a, **k)
    model.train()(IDS, labels=IDS).loss.backward()
    assert len(calls) == model.config.num_hidden_layers
