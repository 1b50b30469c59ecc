"""A module that carries an adapter and is never called is named: its weights are read behind its back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import slimtune as st
from slimtune.core.reach import NotReachedWarning, family


class ReadsWeights(nn.Module):
    """One layer is called, the other's weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class Experts(nn.Module):
    """Of four experts only the first is used."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def quiet(model: nn.Module, *inputs: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*inputs)


def test_a_weight_that_is_read_is_named_once() -> None:
    model, x = ReadsWeights(), torch.randn(2, 4)
    st.attach(model, st.LoRA(r=2))
    with st.disabled(model):
        quiet(model, x)  # the bare base says nothing
    with pytest.warns(NotReachedWarning, match=r"1 of the 2 modules.*: read\..*exclude=\('read',\)"):
        model(x)
    quiet(model, x)


def test_the_hint_works() -> None:
    model = ReadsWeights()
    st.attach(model, st.LoRA(r=2, exclude=("read",)))
    quiet(model, torch.randn(2, 4))


def test_each_adapter_is_looked_at_when_it_is_first_used() -> None:
    model, x = ReadsWeights(), torch.randn(2, 4)
    st.attach(model, st.LoRA(r=2, targets="called"), name="a")
    quiet(model, x)
    st.attach(model, st.LoRA(r=2, targets="read"), name="b")
    with st.use(model, "a"):
        quiet(model, x)
    with pytest.warns(NotReachedWarning, match="1 of the 1 modules"):
        model(x)


def test_merging_what_was_bypassed_says_so() -> None:
    model, x = ReadsWeights(), torch.randn(2, 4)
    st.attach(model, st.LoRA(r=2))
    with pytest.warns(NotReachedWarning):
        model(x)
    with pytest.warns(NotReachedWarning, match="merged"):
        st.merge(model)
    assert any("not called" in note and "read" in note for note in st.report(model).notes)


def test_an_expert_that_no_token_was_sent_to_is_no_fault() -> None:
    model = Experts()
    st.attach(model, st.LoRA(r=2))
    quiet(model, torch.randn(2, 4))
    assert family("model.layers.3.experts.12.w1") == "model.layers.*.experts.*.w1"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_look_for_themselves(how) -> None:
    model = ReadsWeights()
    st.attach(model, st.LoRA(r=2))
    with pytest.warns(NotReachedWarning):
        how(model)(torch.randn(2, 4))


def test_a_table_that_is_tied_to_a_called_one_is_no_fault() -> None:
    """T5 never calls `shared`; its rows are those of the tables of encoder and decoder."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0))
    st.attach(model, st.TrainableTokens(tokens=(3, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotReachedWarning)
        model(input_ids=torch.randint(0, 32, (1, 5)), labels=torch.randint(0, 32, (1, 5)))


def test_detach_leaves_no_hook() -> None:
    model = ReadsWeights()
    before = dict(model._forward_hooks)
    st.attach(model, st.LoRA(r=2))
    st.detach(model, "default")
    assert model._forward_hooks == before


def test_mamba_reads_the_weights_of_its_layers() -> None:
    """The mixer reads `dt_proj.weight` and `conv1d.weight`: an adapter on dt_proj does nothing until it is merged."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=32, time_step_rank=4)
    model = MambaForCausalLM(config)
    st.attach(model, st.LoRA(r=2))
    with pytest.warns(NotReachedWarning, match="dt_proj"):
        model(torch.randint(0, 32, (1, 5)))
