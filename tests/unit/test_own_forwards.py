"""Linear layers with a forward of their own: those that are the plain product are adapted, all others are refused before anything changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PhimoeConfig, PhimoeForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

import slimtune as st
from slimtune.ports.linear import LinearKind


class NormHead(nn.Linear):
    """Normalises its weight: anew at each step of training, for good at the first forward afterwards."""

    first = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, F.normalize(self.weight))
        if self.first:
            self.first = False
            self.weight.data = F.normalize(self.weight)
        return F.linear(x, self.weight)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class TrainingOnly(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight) if self.training else self.weight, self.bias)


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class Scaled(nn.Linear):
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def made(cls: type, **attributes: float) -> nn.Linear:
    layer = cls(8, 6)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


REFUSED = {
    "norm head": lambda: made(NormHead),
    "cosine": lambda: made(Cosine),
    "while it trains": lambda: made(TrainingOnly),
    "scaled": lambda: made(Scaled, scale=2.0),
    "bitnet": lambda: AutoBitLinear(8, 6, bias=False, use_rms_norm=False),
    "grouped": lambda: DeepseekV4GroupedLinear(4, 6, 2),
    "llama4 router": lambda: Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_forward_that_is_not_the_product_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "odd": REFUSED[name]()})
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(st.SiteError, match=r"has a forward of its own(.|\n)*exclude=") as error:
        st.attach(model, st.LoRA(r=2, targets="odd"))
    assert "odd" in str(error.value)
    assert type(model["odd"]).__name__ in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("cls", [FalconLinear, Dropping])
def test_a_forward_that_is_the_product_is_adapted_and_merges(cls: type) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(8, 6)).eval(), torch.randn(3, 8)
    st.attach(model, st.LoRA(r=2))
    nn.init.normal_(model[0].slim.default.weight.B)
    y = model(x)
    st.merge(model)
    assert (model(x) - y).abs().max() < 1e-5


def test_what_an_attribute_decides_is_asked_for_each_value() -> None:
    kind = LinearKind()
    assert kind.problem(made(Scaled, scale=1.0)) == ""
    assert kind.problem(made(Scaled, scale=3.0)) != ""
    assert kind.problem(made(Scaled, scale=1.0)) == ""


def test_a_layer_of_zeros_hides_nothing() -> None:
    layer = made(Cosine)
    nn.init.zeros_(layer.weight)
    assert LinearKind().problem(layer)


def test_meta_and_packed_weights_are_judged_by_who_knows_them() -> None:
    assert LinearKind().problem(made(Cosine).to("meta"))  # the class tells
    assert LinearKind().problem(BitLinear(8, 8, bias=False)) == ""  # uint8: its own rule, refused where the weight is read


def phimoe() -> nn.Module:
    torch.manual_seed(0)
    return PhimoeForCausalLM(
        PhimoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def test_all_linear_leaves_routers_out_and_says_so() -> None:
    model, ids = phimoe(), torch.randint(1, 32, (2, 5))
    before = model(ids).logits
    report = st.attach(model, st.LoRA(r=2))
    assert report.left["PhimoeTopKRouter 4x16"] == 2
    assert not any("router" in row.path for row in report.rows)
    assert torch.equal(model(ids).logits, before)


def test_named_routers_are_refused_and_the_hint_works() -> None:
    model = phimoe()
    with pytest.raises(st.SiteError, match=r"exclude=\('router',\)"):
        st.attach(model, st.LoRA(r=2, targets=("q_proj", "router")))
    st.attach(model, st.LoRA(r=2, targets=("q_proj", "router"), exclude=("router",)))


def test_a_model_of_such_layers_alone_says_why() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    for layer in model.model.layers.modules():
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, AutoBitLinear(child.in_features, child.out_features, bias=False))
    with pytest.raises(st.SiteError, match="AutoBitLinear has a forward of its own"):
        st.attach(model, st.LoRA(r=2))


def test_a_class_is_asked_once() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(math.prod(x.shape))
            return super().forward(x)

    model = nn.Sequential(*[Counted(8, 8) for _ in range(5)])
    st.attach(model, st.LoRA(r=2))
    assert len(calls) == 4  # two modes, twice each, for the first of them
