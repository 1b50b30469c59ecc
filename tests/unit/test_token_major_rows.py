"""A plan by rows in modules that see tokens laid end to end: each row as it is alone; routed tokens are refused by name, also where they fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)  # fmt: skip

import slimtune as st

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE)),
    "qwen3-next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **MOE, head_dim=8, linear_conv_kernel_dim=2, linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=2,
            linear_num_value_heads=2, layer_types=["linear_attention", "full_attention"],
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, moe_layers=[0, 1])
    ),
    "jetmoe": lambda: JetMoeForCausalLM(
        JetMoeConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=24, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=32,
        )
    ),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
    "patchtst": lambda: PatchTSTForPrediction(
        PatchTSTConfig(
            num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, d_model=16, num_attention_heads=2, num_hidden_layers=2,
            ffn_dim=16, prediction_length=4,
        )
    ),
}  # fmt: skip
ROWS = ["a", None, "b"]


def adapted(model: nn.Module, **options: object) -> nn.Module:
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        st.attach(model, st.LoRA(r=2, **options), name=name)
        for op in model.slim_state.adapters[name].ops.values():
            for p in op.parameters():
                nn.init.normal_(p, std=0.3)
    return model


def answer(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.prediction_outputs if hasattr(out, "prediction_outputs") else out.logits


def alone(model: nn.Module, x: Tensor, rows: list[str | None] = ROWS) -> Tensor:
    parts = []
    for i, name in enumerate(rows):
        with st.use(model, name):
            parts.append(answer(model, x[i : i + 1]))
    return torch.cat(parts)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_as_it_is_alone(name: str, grad: bool) -> None:
    torch.manual_seed(0)
    model = adapted(MODELS[name]().eval())
    x = torch.randn(3, 16, 3) if name == "patchtst" else torch.randint(3, 32, (3, 6))
    with torch.set_grad_enabled(grad):
        with st.use(model, rows=ROWS):
            mixed = answer(model, x)
        assert (mixed - alone(model, x)).abs().max() < 1e-5
        with st.disabled(model):
            effect = (mixed - answer(model, x)).abs().flatten(1).amax(1)
    assert effect[0] > 1e-3
    assert effect[1] < 1e-6
    assert effect[2] > 1e-3


def test_other_numbers_of_tokens_and_rows_follow() -> None:
    torch.manual_seed(0)
    model = adapted(MODELS["qwen2-moe"]().eval())
    with torch.no_grad():
        for rows, length in ((ROWS, 1), (ROWS, 5), (["b", "a"], 3), (["a", "b", None, "a"], 4)):
            x = torch.randint(3, 32, (len(rows), length))
            with st.use(model, rows=rows):
                assert (answer(model, x) - alone(model, x, rows)).abs().max() < 1e-5


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_follow(how: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = adapted(MODELS["phimoe"]().eval()), torch.randint(3, 32, (3, 6))
    with torch.no_grad(), st.use(model, rows=ROWS):
        before = answer(model, x)
    other = how(model)
    with torch.no_grad(), st.use(other, rows=ROWS):
        assert torch.equal(answer(other, x), before)


class Routed(nn.Module):
    """As Mixtral was before transformers 5: experts are layers, each gets the tokens that chose it."""

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = (flat[:, 0] > 0).long()
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = torch.where(chosen == i)[0]
            out = out.index_add(0, at, expert(flat[at]))
        return out.view_as(x)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x + 0 * self.first(x))


@pytest.mark.parametrize("tokens", [2, 4, 3], ids=["as many as rows", "a multiple of them", "an odd number"])
def test_routed_tokens_are_refused_also_where_their_number_fits(tokens: int) -> None:
    model = adapted(Net(Routed()))
    x = -torch.ones(2, 3, 4)
    x.view(6, 4)[:tokens] = 1  # they choose the second expert, the others the first
    with st.use(model, rows=["a", "b"]), pytest.raises(st.PlanError, match="routed") as error:
        model(x)
    assert "blocks.0.experts.0" in str(error.value)
    with pytest.raises(st.PlanError, match=r"blocks\.0\.experts\.0"):  # from now on it is known before the forward
        st.use(model, rows=["a", "b"])
    with st.use(model, "a"):  # as the hint says
        model(x)


def test_the_hint_works_where_routed_experts_are_left_out() -> None:
    model = adapted(Net(Routed()), exclude=("*.experts.*",))
    with st.use(model, rows=["a", "b"]):
        model(torch.randn(2, 3, 4))


class Spatial(nn.Module):
    """As blocks of diffusion models: [B, C, H, W] to [B, HW, C], with layers kept in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Spatial()])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_layers_in_lists_that_see_whole_rows_are_none_of_that() -> None:
    torch.manual_seed(0)
    model, x = adapted(Pictures()), torch.randn(3, 4, 2, 2)
    with st.use(model, rows=ROWS):
        mixed = model(x)
    assert (mixed - alone(model, x)).abs().max() < 1e-5
