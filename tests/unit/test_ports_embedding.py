"""Embeddings: padding, scaling, tied heads, refusals, parity with the reference library."""

from __future__ import annotations

import pytest
import torch
from ports_props import check_all, check_bf16, check_gradients, check_rows, put_factors, randomise
from torch import nn

import slimtune as st


class Scaled(nn.Embedding):
    """As transformers' scaled word embeddings: the scale is a buffer."""

    def __init__(self, *args: int, padding_idx: int | None = None) -> None:
        super().__init__(*args, padding_idx=padding_idx)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


def build(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    if kind == "scaled":
        return nn.Sequential(Scaled(11, 6))
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=2 if kind == "padded" else None))


IDS = torch.tensor([[1, 2, 3], [4, 4, 5], [10, 0, 2], [7, 8, 9]])
LORA = st.LoRA(r=3, targets="embedding")


def call(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)


@pytest.mark.parametrize("kind", ["plain", "scaled", "padded"])
@pytest.mark.parametrize("spec", [LORA, st.LoRA(r=3, targets="embedding", init="gaussian"), st.Dense(targets="embedding")], ids=str)
def test_properties(kind: str, spec: st.Spec) -> None:
    check_all(build(kind), call, IDS, spec)


@pytest.mark.parametrize("kind", ["plain", "scaled", "padded"])
def test_rows(kind: str) -> None:
    check_rows(build(kind), call, IDS, lambda b, s: b[s], LORA)


def test_gradients_and_bf16() -> None:
    check_gradients(build("scaled"), call, IDS, LORA)
    check_bf16(build("scaled"), call, IDS, LORA)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa"])
def test_padding_row_never_changes(init: str) -> None:
    model = build("padded")
    before = model[0].weight[2].clone()
    st.attach(model, st.LoRA(r=3, targets="embedding", init=init))
    optimiser = torch.optim.AdamW(model.slim_state.adapters["default"].parameters(), lr=0.1)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimiser.step()
    assert not torch.allclose(model(torch.tensor([1])), model[0].weight[1])
    torch.testing.assert_close(model(torch.tensor([2]))[0], before)
    st.merge(model, "default")
    torch.testing.assert_close(model[0].weight[2], before)


def test_tied_head_keeps_its_weight() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, tie_word_embeddings=True)
    ).eval()
    weight = model.lm_head.weight
    assert model.get_input_embeddings().weight is weight
    ids = torch.randint(0, 20, (2, 5))
    st.attach(model, LORA)
    randomise(model, "default")
    live = model(ids).logits
    st.merge(model, "default")
    assert model.lm_head.weight is weight
    torch.testing.assert_close(model(ids).logits, live, atol=1e-5, rtol=1e-5)
    st.unmerge(model)
    assert model.get_input_embeddings().weight is weight


def test_refusals() -> None:
    for options in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(st.SlimtuneError, match=next(iter(options))):
            st.attach(nn.Sequential(nn.Embedding(5, 4, **options)), st.LoRA(targets=("0",)))

    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids + 2)

    with pytest.raises(st.SlimtuneError, match="forward of its own"):
        st.attach(nn.Sequential(Shifted(9, 4)), st.LoRA(targets=("0",)))
    with pytest.raises(st.SlimtuneError, match="cannot be dropped"):
        st.attach(build(), st.LoRA(targets="embedding", dropout=0.1))
    with pytest.raises(st.SlimtuneError, match="takes no bias"):
        st.attach(build(), st.LoRA(targets="embedding", up_bias=True))


def test_gemma() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5))
    check_all(model, call, IDS, LORA)


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_reference_parity(kind: str) -> None:
    import peft
    ours, theirs = build(kind), build(kind)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    layer = theirs.base_model.model[0]
    st.attach(ours, st.LoRA(r=3, alpha=6, targets="embedding"))
    op = next(iter(ours.slim_state.adapters["default"].ops.values()))
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert (A.shape, B.shape) == (op.A.shape, op.B.shape)
    put_factors(op, A, B)
    torch.testing.assert_close(ours(IDS), theirs(IDS), atol=1e-6, rtol=1e-5)
    st.merge(ours, "default")
    torch.testing.assert_close(ours[0].weight, theirs.merge_and_unload()[0].weight, atol=1e-6, rtol=1e-5)
