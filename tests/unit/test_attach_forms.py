"""What people type first: another form of attach, the report taken for the model, a name that cannot be, `use` without a name."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core import errors
from slimtune.testing import zoo


def specs_of(model: nn.Module) -> dict[str, st.Spec]:
    return {name: view.spec for name, view in st.adapters(model).items()}


def test_a_name_a_class_and_a_spec_say_the_same() -> None:
    model = zoo.llama()
    st.attach(model, "lora", r=4, name="a")
    st.attach(model, st.LoRA, r=4, name="b")
    st.attach(model, st.LoRA(r=4), name="c")
    st.attach(model, st.LoRA, name="d")
    assert specs_of(model) == {"a": st.LoRA(r=4), "b": st.LoRA(r=4), "c": st.LoRA(r=4), "d": st.LoRA()}


@pytest.mark.parametrize(
    ("spec", "options", "words", "hint"),
    [
        (st.LoRA(), {"r": 8}, "beside its class or name", "st.LoRA(r=...)"),
        ("loraa", {}, "no method is called 'loraa'", "lora"),
        ("lora", {"lora_alpha": 3}, "no option 'lora_alpha'", "alpha=3"),
        ({"r": 8}, {}, "needs a spec, not dict", "st.LoRA"),
        (nn.Linear, {}, "needs a spec, not type", "st.LoRA"),
        (None, {}, "needs a spec, not NoneType", "st.LoRA"),
    ],
)
def test_other_forms_say_what_to_write(spec: Any, options: dict[str, Any], words: str, hint: str) -> None:
    model = zoo.llama()
    with pytest.raises(st.SpecError, match=words) as caught:
        st.attach(model, spec, **options)
    assert hint in caught.value.hint
    assert not st.adapters(model)


# ---- configs of the reference ----------------------------------------------------------------------------------------
CONFIGS: list[tuple[Any, st.Spec]] = [
    (peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, layers_to_transform=[0]),
     st.LoRA(r=4, alpha=8, targets=("q_proj", "v_proj"), dropout=0.1, layers="0")),
    (peft.LoraConfig(target_modules="all-linear", use_dora=True), st.DoRA(of=st.LoRA(alpha=8), targets="all-linear")),
    (peft.LoraConfig(target_modules=r".*q_proj", use_rslora=True, init_lora_weights="pissa"),
     st.LoRA(targets="re:.*q_proj", alpha=8, rank_stabilised=True, init="pissa")),
    (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), st.LoRA(targets=("q_proj",), alpha=8, train_modules=("re:(.*\\.)?norm",))),
    (peft.AdaLoraConfig(total_step=100, target_modules=["q_proj"], tinit=10, tfinal=20),
     st.AdaLoRA(targets=("q_proj",), alpha=8, t_init=10, t_final=20, delta_t=1, total_steps=100)),
    (peft.VeraConfig(r=8, target_modules=["q_proj"], vera_dropout=0.2), st.VeRA(r=8, targets=("q_proj",), dropout=0.2)),
    (peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
     st.IA3(targets=("down_proj", "k_proj"), feedforward=("re:.*down_proj",))),
    (peft.LNTuningConfig(target_modules=["input_layernorm"]), st.LayerNormTuning(targets=("input_layernorm",))),
    (peft.TrainableTokensConfig(token_indices=[2, 1]), st.TrainableTokens(tokens=(1, 2))),
    (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), st.PrefixTuning(p=4)),
    (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6),
     st.PrefixTuning(p=4, hidden=6)),
    (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), st.PromptTuning(tokens=4)),
    (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), st.PTuning(tokens=4)),
    (peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3), st.MultitaskPromptTuning(tokens=4, tasks=3)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=lambda v: type(v).__name__)
def test_a_config_of_the_reference_is_the_spec_it_means(config: Any, spec: st.Spec) -> None:
    model = zoo.llama()
    report = st.attach(model, config)
    assert specs_of(model) == {"default": spec}
    assert any(note == f"the config means {specs_of(model)['default']}" for note in report.notes)


def test_what_a_config_leaves_to_the_reference_is_noted() -> None:
    notes = st.attach(zoo.llama(), peft.LoraConfig(task_type="CAUSAL_LM")).notes
    assert any("names no target_modules" in note and "all-linear" in note for note in notes)


def test_modules_to_save_of_a_classifier_come_beside_its_head() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler.dense"])
    report = st.attach(zoo.bert(), config)
    assert {row.path for row in report.rows} >= {"classifier", "bert.pooler.dense"}  # as the reference trains them


@pytest.mark.parametrize(
    ("config", "words", "hint"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias", "st.BitFit()"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "init_lora_weights=False", "one of"),
        (peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), "trainable_token_indices", "st.TrainableTokens"),
        (peft.LoraConfig(target_modules=["q_proj"], layers_pattern="layers", layers_to_transform=[0]), "layers_pattern", "glob"),
        (peft.OFTConfig(target_modules=["q_proj"]), "OFT", "LORA"),
    ],
    ids=["bias", "start", "tokens", "pattern", "oft"],
)
def test_what_has_no_such_form_here_is_refused_by_name(config: Any, words: str, hint: str) -> None:
    model = zoo.llama()
    with pytest.raises(st.SpecError, match=words) as caught:
        st.attach(model, config)
    assert hint in caught.value.hint
    assert not st.adapters(model)


# ---- the report is not the model -------------------------------------------------------------------------------------
@pytest.mark.parametrize("ask", [
    lambda r: r(torch.zeros(1, 2)), lambda r: r.generate(), lambda r: r.parameters(), lambda r: r.train(), lambda r: r.config, lambda r: r.to("cpu"),
    lambda r: r.state_dict(), lambda r: r.merge_and_unload(), lambda r: r.print_trainable_parameters(),
])  # fmt: skip
def test_a_report_taken_for_the_model_says_so(ask: Any) -> None:
    report = st.attach(zoo.llama(), st.LoRA(r=2))
    with pytest.raises(st.ReportError, match="this is a report") as caught:
        ask(report)
    assert "without `model =`" in caught.value.hint


def test_a_report_is_still_an_ordinary_object() -> None:
    import copy
    import pickle

    report = st.attach(zoo.llama(), st.LoRA(r=2))
    assert not hasattr(report, "generate")
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    with pytest.raises(st.ReportError, match="has no 'trainabel'") as caught:
        report.trainabel  # noqa: B018
    assert "trainable" in caught.value.hint


@pytest.mark.parametrize("verb", [lambda m: st.save(m, "x"), lambda m: st.attach(m, st.LoRA()), lambda m: st.use(m, None), lambda m: st.adapters(m)])
def test_no_verb_takes_a_report_for_a_model(verb: Any) -> None:
    report = st.attach(zoo.llama(), st.LoRA(r=2))
    for thing in (report, {"a": 1}, "model"):
        with pytest.raises(st.SiteError, match="no model but a"):
            verb(thing)


# ---- names, use, errors ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["my.adapter", "", "-a", "a b", "a/b", 3, None, "x" * 101])
def test_a_name_that_cannot_be_has_an_error_of_its_own(name: Any, tmp_path: Path) -> None:
    model = zoo.llama()
    with pytest.raises(st.InvalidName) as caught:
        st.attach(model, st.LoRA(), name=name)
    assert not isinstance(caught.value, st.NameInUse)
    st.attach(model, st.LoRA(), name=eval(caught.value.hint.removeprefix("name=")))  # the hint works


def test_use_says_what_it_needs() -> None:
    model = zoo.llama()
    st.attach(model, st.LoRA(r=2), name="a")
    with pytest.raises(st.PlanError, match="what to use") as caught:
        st.use(model)
    assert "st.use(model, 'a')" in caught.value.hint
    assert "None" in caught.value.hint
    assert st.adapters(model)["a"].active, "nothing has changed"
    st.use(model, None)
    assert not st.adapters(model)["a"].active
    with pytest.raises(st.SpecError, match="not both"):
        st.use(model, "a", rows=["a"])


def test_every_error_is_public() -> None:
    own = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, st.SlimtuneError)]
    assert len(own) > 10
    assert all(getattr(st, cls.__name__) is cls for cls in own)


def test_dir_shows_verbs_errors_and_every_method() -> None:
    shown = set(dir(st))
    assert {"attach", "adapters", "use", "load", "TargetError", "Report"} <= shown
    assert {cls.__name__ for cls in st.methods().values() if cls.__module__.startswith("slimtune.")} <= shown
    assert all(hasattr(st, name) for name in shown)


def test_the_stub_is_what_the_registry_makes() -> None:
    from slimtune.testing.stub import FILE, stub

    assert FILE.read_text(encoding="utf-8") == stub(), "python -m slimtune.testing.stub --write"
    for cls in st.methods().values():
        if cls.__module__.startswith("slimtune."):
            assert f"class {cls.__name__}(_{cls.__name__}):" in stub()
