"""The self-check on the user's own model: it passes and runs once, and what behaves otherwise is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import slimtune as st
from slimtune.core.errors import InternalsError, TargetError
from slimtune.ports import transformers_internals as internals
from slimtune.ports import trial
from slimtune.testing import zoo
from slimtune.testing.cases import rescale

IDS = torch.tensor([[17, 8, 31, 44, 12]])
PROMPT, PREFIX = st.PromptTuning(tokens=3), st.PrefixTuning(p=3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "RESULTS", {})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    for name in ("_virtual_tokens", "_prefixes", "_generation"):
        monkeypatch.setattr(trial, name, counting(getattr(trial, name), ran))
    return ran


def counting(own: Callable[..., None], ran: list[str]) -> Callable[..., None]:
    @functools.wraps(own)
    def run(*args: Any) -> None:
        ran.append(own.__name__)
        own(*args)

    return run


def made(name: str, spec: st.Spec) -> Any:
    torch.manual_seed(1)
    model = rescale(getattr(zoo, name)()).eval()
    st.attach(model, spec)
    return model


def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "version", lambda: "5.99.0")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bloom"])
def test_it_passes_and_runs_once_for_all_models_of_a_kind(name: str, counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    untested(monkeypatch)
    more = {"decoder_input_ids": IDS} if name == "t5" else {}
    for _ in range(2):
        model = made(name, PROMPT)
        for _ in range(2):
            model(IDS, **more)
    assert counted == ["_virtual_tokens"]
    assert {result for result, _ in trial.RESULTS.values()} == {"passed"}


def test_prefixes_and_generation_are_tried_once(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    untested(monkeypatch)
    model = made("llama", PREFIX)
    model(IDS)
    model(IDS)
    assert counted == ["_prefixes"]
    model = made("llama", PROMPT)
    for _ in range(2):
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert counted == ["_prefixes", "_generation", "_virtual_tokens"]
    model.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")
    assert counted[3:] == ["_generation"], "another cache is another way to generate"
    assert {result for result, _ in trial.RESULTS.values()} == {"passed"}


def test_it_goes_on_beside_the_tasks_of_the_users_rows() -> None:
    model = made("llama", st.MultitaskPromptTuning(tokens=3, tasks=3))
    with st.tasks(model, [0, 2]):
        model(IDS.expand(2, -1))
    st.tasks(model, [1, 2])
    model.generate(IDS.expand(2, -1), max_new_tokens=2, do_sample=False)
    assert [result for result, _ in trial.RESULTS.values()] == ["passed", "passed"]
    assert model.slim_state.tasks is not None


def test_it_leaves_no_trace() -> None:
    model = made("llama", st.PromptTuning(tokens=3, init="like_tokens")).train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    keys = list(model.state_dict())
    model(IDS, labels=IDS).loss.backward()
    assert trial.RESULTS
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    assert list(model.slim_state.adapters) == ["default"]
    assert model.slim_state.current().names == {"default"}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def cache_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 5.24 did: a cache that comes in under a name that is not known."""
    monkeypatch.setattr("slimtune.ports.stream_body.cache_in", lambda arguments: None)


def ids_that_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that scales what it embeds itself, and takes embeddings as they are."""
    own = transformers.LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, inputs_embeds: Any = None, **kw: Any) -> Any:
        x = inputs_embeds if input_ids is None else 4 * self.embed_tokens(input_ids)
        return own(self, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=x, **kw)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)


@pytest.mark.parametrize("change", [cache_under_another_name, ids_that_are_scaled])
@pytest.mark.parametrize("known", [True, False])
def test_an_internal_that_behaves_otherwise_is_refused_by_name(change: Any, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    if not known:
        untested(monkeypatch)
    model = made("llama", PROMPT)
    for _ in range(2):  # the refusal is kept, too
        with pytest.raises(InternalsError, match="virtual tokens in front of its input") as caught:
            model(IDS)
    assert "LlamaModel of transformers" in caught.value.where
    assert ("never tested" in caught.value.where) is not known
    assert "pip install" in caught.value.hint
    with st.use(model, None):
        model(IDS)


def test_attention_that_drops_what_is_in_front_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.ports import attend

    own = attend.extended

    def extended(*args: Any, **kwargs: Any) -> Any:
        mask = own(*args, **kwargs)
        return mask if mask is None else mask.flip(-1)

    monkeypatch.setattr(attend, "extended", extended)
    untested(monkeypatch)
    model = made("llama", PREFIX)
    with pytest.raises(InternalsError, match="keys and values in front of its attention do not act"):
        model(IDS)


def test_generation_that_prepares_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = transformers.LlamaForCausalLM.prepare_inputs_for_generation

    def prepare(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = own(self, input_ids, *args, **kwargs)
        if self.slim_state.current().names:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return inputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "prepare_inputs_for_generation", prepare)
    model = made("llama", PROMPT)
    model(IDS)
    with pytest.raises(InternalsError, match="virtual tokens in `generate` do not act"):
        model.generate(IDS, max_new_tokens=2, do_sample=False)


def test_methods_of_generate_that_are_gone_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(internals.GENERATION, "_prepare_everything", ("batch_size",))
    model = made("llama", PROMPT)
    with pytest.raises(InternalsError, match="_prepare_everything is not there"):
        model.generate(IDS, max_new_tokens=2)


def test_a_base_that_cannot_be_called_so_is_a_warning_or_on_an_untested_version_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise trial.Untried("it wants pictures")

    monkeypatch.setattr(trial, "_virtual_tokens", never)
    model = made("llama", PROMPT)
    with pytest.warns(UserWarning, match="could not be compared with its base: it wants pictures"):
        model(IDS)
    monkeypatch.setattr(trial, "RESULTS", {})
    untested(monkeypatch)
    with pytest.raises(InternalsError, match="cannot be compared with the bare base: it wants pictures"):
        made("llama", PROMPT)(IDS)


def test_a_model_patched_afterwards_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made("llama", PROMPT)(IDS)
    ids_that_are_scaled(monkeypatch)
    with pytest.raises(InternalsError):
        made("llama", PROMPT)(IDS)


def test_other_methods_are_not_tried(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    untested(monkeypatch)
    made("llama", st.LoRA(r=2))(IDS)
    made("gpt2", st.IA3())(IDS)
    assert counted == []


def test_a_recurrent_body_has_no_place_for_virtual_tokens() -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=99, state_size=4)
    with pytest.raises((TargetError, st.SiteError, st.SpecError), match="recurrent"):
        st.attach(transformers.MambaForCausalLM(config), PROMPT)
