"""Weights that others write to, fuse or copy under an adapter: the base comes back in any mode, or it is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

import slimtune as st


def adapted(model: nn.Module) -> nn.Module:
    st.attach(model, st.LoRA(r=2))
    for op in model.slim_state.adapters["default"].ops.values():
        for p in op.parameters():
            nn.init.normal_(p, std=0.3)
    return model


class Rescales(nn.Module):
    """As RWKV: a weight is divided for inference and multiplied again for training."""

    def __init__(self, by: float = 4.0) -> None:
        super().__init__()
        self.layer, self.by, self.divided = nn.Linear(4, 4), by, False

    def forward(self, x: Tensor) -> Tensor:
        if self.divided == self.training:
            with torch.no_grad():
                self.layer.weight.mul_(self.by if self.training else 1 / self.by)
            self.divided = not self.training
        return self.layer(x)


def rwkv() -> nn.Module:
    torch.manual_seed(0)
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=32, hidden_size=8, num_hidden_layers=3, attention_hidden_size=8, intermediate_size=12, rescale_every=1)
    )


@pytest.mark.parametrize("merged_in", [True, False], ids=["merged in training", "merged in eval"])
@pytest.mark.parametrize("out_in", [True, False], ids=["unmerged in training", "unmerged in eval"])
def test_unmerge_gives_the_base_back_in_any_mode(merged_in: bool, out_in: bool) -> None:
    model, ids = rwkv(), torch.randint(1, 32, (1, 5))
    with torch.no_grad():
        before = model.eval()(ids).logits
        adapted(model)
        with st.disabled(model):
            model.train(merged_in)(ids)
        st.merge(model)
        model.train(out_in)(ids)
        st.unmerge(model)
        with st.disabled(model):
            assert torch.equal(model.eval()(ids).logits, before)


def test_disabled_is_the_base_of_this_mode_while_merged() -> None:
    model, x = Rescales().eval(), torch.randn(2, 4)
    before = model(x)
    adapted(model)
    model.train()
    with st.disabled(model):
        training = model(x)
    st.merge(model)
    model.eval()(x)
    with st.disabled(model):
        assert torch.equal(model(x), before)
    model.train()(x)
    with st.disabled(model):
        assert torch.equal(model(x), training)
    with pytest.raises(st.MergeError, match="while the merged ones were out"), st.disabled(model):
        model.eval()(x)


def test_other_changes_of_merged_weights_are_refused_by_name_and_the_hints_work() -> None:
    torch.manual_seed(0)
    model, x = adapted(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    st.merge(model)
    kept = model[0].weight.clone()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    changed = model(x)
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(st.MergeError, match="changed since the merge: 0"):
            st.unmerge(model)
        assert torch.equal(model(x), changed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.copy_(kept)
    st.unmerge(model)
    st.merge(other, keep=False)
    assert torch.equal(other(x), changed)


def test_projections_with_adapters_are_not_fused() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(8, heads=2, dim_head=4)).eval(), torch.randn(1, 3, 8)
    adapted(model)
    y = model(x)
    with pytest.raises(st.SiteError, match="fused"):
        model[0].fuse_projections()
    st.merge(model, keep=False)  # as the hint says
    with torch.no_grad():
        model[0].fuse_projections()
        assert (model(x) - y).abs().max() < 1e-5
    assert type(model[0]) is Attention


def blocks() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))


COPIES = pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])


@COPIES
def test_a_block_replaced_by_its_copy_is_refused(twin) -> None:
    model, x = adapted(blocks()), torch.randn(2, 4)
    model[0] = twin(model[0])
    with pytest.raises(st.SiteError, match="copy of a part"):
        model(x)


@COPIES
def test_a_block_added_as_a_copy_is_refused(twin) -> None:
    model, x = adapted(blocks()), torch.randn(2, 4)
    model(x)
    model.append(twin(model[1]))
    with pytest.raises(st.SiteError, match=r"1\.0"):
        model(x)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_whole_model_is_none_of_that(how) -> None:
    model, x = adapted(blocks()), torch.randn(2, 4)
    other = how(model)
    assert torch.equal(other(x), model(x))
    assert not other.slim_state.unreached  # nothing is looked for any more
    part = copy.deepcopy(model[0])  # and a part that runs by itself does
    assert torch.equal(part(x), model[0](x))
