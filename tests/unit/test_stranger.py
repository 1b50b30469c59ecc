"""What somebody types who knows other tools, and nothing of this one but the README: each answer shows the call that works."""

from pathlib import Path
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
    with pytest.raises(AttributeError, match=r"zzzz'$"):
        _ = st.zzzz  # type: ignore[attr-defined]


def test_files_from_habit_show_the_call(tmp_path: Path) -> None:
    st.save(small(), tmp_path / "a", name="a")
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(st.FileError, match="is a file") as caught:
        st.load(base, tmp_path / "a" / "adapter_model.safetensors")
    assert caught.value.hint == f"give its folder: st.load(model, {str(tmp_path / 'a')!r})"
    for relax, hint in ((True, "relax='base'"), ("bse", "relax='base'")):
        with pytest.raises(st.SpecError) as wrong:
            st.load(base, tmp_path / "a", relax=relax)  # type: ignore[arg-type]
        assert hint in wrong.value.hint
    wide = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(st.MismatchError, match="another base") as shapes:
        st.load(wide, tmp_path / "a")
    assert "relax" not in shapes.value.hint
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(st.MismatchError, match="another base") as values:
        st.load(other, tmp_path / "a")
    assert "relax='base'" in values.value.hint


@pytest.mark.parametrize(("name", "hint"), [(None, "name='default'"), ("ü", "name='u'"), ("日本", "name='default'"), ("a.b", "name='a-b'")])
def test_names_that_cannot_be(name: Any, hint: str) -> None:
    with pytest.raises(st.InvalidName) as caught:
        st.attach(nn.Sequential(nn.Linear(8, 8)), st.LoRA(), name=name)
    assert hint in caught.value.hint


def test_a_checkpoint_of_another_rank_names_the_shapes(tmp_path: Path) -> None:
    from slimtune.integrations.trainer import restore
    from slimtune.train.checkpoint import write_tensors

    def model(r: int) -> Any:
        made = nn.Sequential(nn.Linear(8, 8))
        st.attach(made, st.LoRA(r=r))
        return made

    write_tensors(model(2), "default", tmp_path)
    with pytest.raises(st.FileError, match=r"\[2, 8\] there, \[4, 8\] here \(and 1 more\)") as caught:
        restore(model(4), tmp_path)
    assert "recipe" not in str(caught.value)


def test_reports_say_which_tokens_and_what_rank_is_too_high() -> None:
    report = st.attach(nn.Sequential(nn.Embedding(10, 4)), st.TrainableTokens(tokens=(7, 3)))
    assert "the rows of 2 token(s) train: 3, 7" in report.notes
    wide = st.attach(nn.Sequential(nn.Linear(8, 8)), st.LoRA(r=1000))
    assert "the rank is above what 1 modules can have, so a part of it is idle: 0" in wide.notes


def test_empty_messages_and_short_rows_say_so(tmp_path: Path) -> None:
    from slimtune.train.messages import chat_row
    from slimtune.train.row_files import rows_of_file

    with pytest.raises(ValueError, match="every message of the assistant is empty"):
        chat_row({}, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}])
    with pytest.raises(ValueError, match="no message of the assistant"):
        chat_row({}, [{"role": "user", "content": "Hi"}])
    (tmp_path / "a.csv").write_text("text,label\na,x\nb\n")
    with pytest.raises(st.DataError, match="row 2 has 1 fields") as caught:
        list(rows_of_file(tmp_path / "a.csv"))
    assert "nothing stands for label" in caught.value.hint


def test_an_unfinished_run_names_the_command(tmp_path: Path) -> None:
    from slimtune.train.runs import open_run

    (tmp_path / "recipe.yaml").write_text("data: x\n")
    with pytest.raises(st.FileError, match="no result yet") as caught:
        open_run(tmp_path)
    assert caught.value.hint == f"finish it: slimtune train {tmp_path / 'recipe.yaml'} --resume"


def test_combining_adapters_of_other_heads_on_the_command_line_says_so(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from slimtune.cli.combine import run

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, pad_token_id=0)
    for name, cls in (("lm", LlamaForCausalLM), ("cls", LlamaForSequenceClassification)):
        cls(config).save_pretrained(tmp_path / f"base_{name}")
        model = cls.from_pretrained(tmp_path / f"base_{name}")
        st.attach(model, st.LoRA(r=2))
        st.save(model, tmp_path / name)
    for first, second in (("lm", "cls"), ("cls", "lm")):
        with pytest.raises(st.MismatchError, match="another kind of head") as caught:
            run([f"{tmp_path / first}=1", str(tmp_path / second)], str(tmp_path / "out"), "linear", None, None, None, False, None)
        assert "st." not in caught.value.hint
