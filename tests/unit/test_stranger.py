"""What somebody types who knows other tools, and nothing of this one but the README: each answer shows the call that works."""

from typing import Any

import pytest

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
