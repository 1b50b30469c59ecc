"""What somebody types who knows other tools, and nothing of this one but the README: each answer shows the call that works."""

from typing import Any

import pytest
from torch import nn

import slimtune as st


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (lambda: st.Union(st.LoRA(), st.IA3()), "Union(of=[st.LoRA(), st.IA3()])"),
        (lambda: st.Union(st.LoRA(r=4), st.IA3), "Union(of=[st.LoRA(r=4), st.IA3()])"),
        (lambda: st.LoRA(4), "LoRA(r=4)"),
        (lambda: st.LoRA(4, 8), "LoRA(r=4, alpha=8)"),
        (lambda: st.LoRA("q_proj"), "LoRA(targets='q_proj')"),
        (lambda: st.LoRA(["q_proj", "v_proj"]), "LoRA(targets=['q_proj', 'v_proj'])"),
        (lambda: st.DoRA(st.LoRA(r=4)), "DoRA(of=st.LoRA(r=4))"),
        (lambda: st.DoRA(r=4), "of=st.LoRA(r=4)"),
        (lambda: st.DoRA(r=4, lora_alpha=8), "of=st.LoRA(r=4, alpha=8)"),
    ],
)
def test_specs_written_as_elsewhere_show_the_call(typed: Any, hint: str) -> None:
    with pytest.raises(st.SpecError) as caught:
        typed()
    assert hint in caught.value.hint
    eval(f"st.{hint}" if hint[0].isupper() else f"st.DoRA({hint})").validate()


def union_in(hint: str) -> Any:
    return eval(hint[hint.index("st.Union") :], {"st": st})


def test_biases_and_tokens_of_one_config_are_a_union_of_the_same_size() -> None:
    import peft
    from transformers import BertConfig, BertModel

    def bert() -> Any:
        return BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))

    for more in ({"bias": "lora_only"}, {"trainable_token_indices": [1, 2]}, {"bias": "lora_only", "trainable_token_indices": [3]}):
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["query"], **more)
        theirs = sum(p.numel() for p in peft.get_peft_model(bert(), config).parameters() if p.requires_grad)
        with pytest.raises(st.SpecError) as of_config:
            st.attach(bert(), config)
        with pytest.raises(st.SpecError) as of_call:
            st.LoRA(r=4, lora_alpha=4, target_modules=["query"], **more)
        for caught in (of_config, of_call):
            spec = union_in(caught.value.hint)
            assert (spec.of[0].r, spec.of[0].alpha, spec.of[0].targets) == (4, 4, ("query",))
            assert st.attach(bert(), spec).trainable == theirs


def small() -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    st.attach(model, st.LoRA(r=2), name="a")
    st.attach(model, st.LoRA(r=2), name="b")
    return model


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (lambda m: st.combine(m, ["a", "b"], [0.5, 0.5], "c"), "st.combine(model, {'a': 0.5, 'b': 0.5}, name='c')"),
        (lambda m: st.combine(m, {"a": 1}, name="c", method="svd"), "st.combine(model, {'a': 1}, name='c', how='svd')"),
        (lambda m: st.combine(m, {"a": 1}, name="c", combination_type="linear"), "combination_type= is called how= here"),
        (lambda m: st.combine(m, {"a": 1, "b": 1}), "st.combine(model, {'a': 1, 'b': 1}, name='mix')"),
        (lambda m: st.detach(m), 'st.detach(model, "a")'),
        (lambda m: st.detach(m, adapter_name="a"), "adapter_name= is called name= here"),
        (lambda m: st.param_groups(m, learning_rate=1e-3), "st.param_groups(model, lr=1e-4)"),
        (lambda m: st.attach(m), "st.attach(model, st.LoRA(r=16))"),
    ],
)
def test_calls_from_habit_show_the_call(typed: Any, hint: str) -> None:
    model = small()
    with pytest.raises(st.SpecError) as caught:
        typed(model)
    assert hint in caught.value.hint
    if hint.startswith("st.combine") or "detach" in hint:
        eval(hint, {"st": st, "model": model})


def test_a_type_error_of_something_inside_stays_one() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        st.param_groups(small(), lr=None, up_ratio=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("attatch", "st.attach"), ("LoRa", "st.LoRA"), ("lora", "st.LoRA"), ("get_peft_model", "st.attach(model, st.LoRA(r=16))"),
        ("LoraConfig", "st.LoRA"), ("AdaLoraConfig", "st.AdaLoRA"), ("PrefixTuningConfig", "st.PrefixTuning"), ("IA3Config", "st.IA3"),
        ("PeftModel", "st.load"), ("merge_and_unload", "st.merge(model, keep=False)"), ("set_adapter", "st.use"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_here_names_ours(name: str, ours: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(st, name)
    assert f"; here: {ours}" in str(caught.value)
    assert not hasattr(st, name)
    with pytest.raises(AttributeError, match="zzzz'$"):
        _ = st.zzzz  # type: ignore[attr-defined]
