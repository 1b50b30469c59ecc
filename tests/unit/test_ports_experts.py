"""3-D expert weights: every implementation, layouts of several model families, rows of tokens, parity with the reference library."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from ports_props import check_all, check_bf16, check_gradients, put_factors, randomise
from torch import nn

import slimtune as st

LORA = st.LoRA(r=3, targets="experts")
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip


def mixtral(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    return finish(transformers.MixtralForCausalLM(config), implementation)


def qwen(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SMALL, intermediate_size=12, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=3, head_dim=8
    )
    return finish(transformers.Qwen3MoeForCausalLM(config), implementation)


def gpt_oss(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SMALL, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    return finish(transformers.GptOssForCausalLM(config), implementation)


def nemotron(implementation: str = "eager") -> nn.Module:
    """Experts without a gate."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        hidden_size=16, intermediate_size=12, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, mlp_hidden_act="relu2"
    )
    config._experts_implementation = implementation
    model = nn.Sequential(NemotronHExperts(config))
    model.config = config
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)


def finish(model: nn.Module, implementation: str) -> nn.Module:
    model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "experts" in name:
            p.data.normal_(std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


IDS = torch.randint(1, 40, (4, 6), generator=torch.Generator().manual_seed(0))


def call(model: nn.Module, ids: Any) -> torch.Tensor:
    return model[0](*ids) if isinstance(model, nn.Sequential) else model(ids).logits


def routed(n: int = 10, hidden: int = 16, experts: int = 4, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(experts - 1, generator=g)[:k] for _ in range(n)])  # the last expert gets nothing
    return torch.randn(n, hidden, generator=g), index, torch.rand(n, k, generator=g)


@pytest.mark.parametrize("build", [mixtral, qwen, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("spec", [LORA, st.Dense(targets="experts")], ids=["lora", "dense"])
def test_properties(build: Any, implementation: str, spec: st.Spec) -> None:
    check_all(build(implementation), call, IDS, spec)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_without_a_gate(implementation: str) -> None:
    check_all(nemotron(implementation), call, routed(), LORA)


@pytest.mark.parametrize("build", [mixtral, qwen, gpt_oss])
def test_start_is_the_base_in_eager(build: Any) -> None:
    model = build()
    base = model(IDS).logits
    st.attach(model, LORA)
    torch.testing.assert_close(model(IDS).logits, base, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows(build: Any, implementation: str) -> None:
    model = build(implementation)
    for name in "ab":
        st.attach(model, LORA, name=name)
        randomise(model, name)
    plans = ["a", None, {"a": 0.5, "b": 0.25}, "b"]
    with torch.no_grad():
        with st.use(model, rows=plans):
            mixed = model(IDS).logits
            generated = model.generate(IDS[:, :3], max_new_tokens=3, num_beams=2, do_sample=False)
        for i, which in enumerate(plans):
            with st.use(model, which):
                torch.testing.assert_close(mixed[i : i + 1], model(IDS[i : i + 1]).logits, atol=1e-5, rtol=1e-5)
                alone = model.generate(IDS[i : i + 1, :3], max_new_tokens=3, num_beams=2, do_sample=False)
                assert torch.equal(generated[i, : alone.shape[1]], alone[0])
        with st.use(model, rows=["a", None, "b", None, "a"]), pytest.raises(st.SlimtuneError):
            model(IDS)


def test_gradients() -> None:
    model = nemotron().double()
    x, index, weights = routed(4)
    check_gradients(model, call, (x.double(), index, weights.double()), st.LoRA(r=2, targets="experts"))
    st.attach(model, LORA, name="a")
    randomise(model, "a")
    assert torch.autograd.gradcheck(lambda v: model[0](v, index, weights.double()), (x.double().requires_grad_(),))


def test_bf16() -> None:
    check_bf16(mixtral(), lambda m, ids: m(ids).logits, IDS, LORA)


def test_autocast() -> None:
    model = mixtral()
    st.attach(model, LORA)
    randomise(model, "default")
    live = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits.float(), live, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compile_fullgraph(implementation: str) -> None:
    model = mixtral(implementation)
    st.attach(model, LORA)
    randomise(model, "default")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    with st.use(model, rows=["default", None, None, "default"]):
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_no_dense_delta_is_formed() -> None:
    """The largest tensor made while training is far below one dense weight of all experts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in storages:  # no view
                Largest.size = max(Largest.size, out.numel())
            return out

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL | {"hidden_size": 32}, intermediate_size=64, num_local_experts=16, num_experts_per_tok=2)
    model = finish(transformers.MixtralForCausalLM(config), "eager")
    st.attach(model, LORA)
    with Largest():
        model(IDS[:1]).logits.sum().backward()
    assert Largest.size < 16 * 32 * 64 / 4, Largest.size


def test_one_expert_at_a_time_for_ops_without_factors() -> None:
    from slimtune.core.op import Additive
    from slimtune.ports.experts import ExpertsKind

    asked: list[int] = []

    class Slow(Additive):
        def delta_of(self, e: int) -> torch.Tensor:
            asked.append(e)
            return torch.full((12, 16), float(e))

        def delta(self) -> torch.Tensor:
            return torch.stack([torch.full((12, 16), float(e)) for e in range(4)])

    model = nemotron()
    st.attach(model, LORA)
    op = next(iter(model.slim_state.adapters["default"].ops.values()))
    slow = Slow.__new__(Slow)
    nn.Module.__init__(slow)
    slow.kind, slow.port, slow.param, slow.shape = op.kind, op.port, op.param, op.shape
    assert isinstance(op.kind, ExpertsKind)
    model[0].slim._modules["default"]._modules[op.param] = slow
    live = model[0](*routed())
    assert asked == [0, 1, 2]  # the last expert has no token
    with torch.no_grad():
        model[0].up_proj += slow.delta()
        with st.use(model, None):
            torch.testing.assert_close(model[0](*routed()), live, atol=1e-4, rtol=1e-5)


def test_refusals() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 3
            self.w = nn.Parameter(torch.zeros(3, 4, 5))

    with pytest.raises(st.SlimtuneError, match="how Unknown uses its 3-D weights w is not known"):
        st.attach(nn.Sequential(Unknown()), LORA)
    with pytest.raises(st.SlimtuneError, match="takes no bias"):
        st.attach(mixtral(), st.LoRA(targets="experts", up_bias=True))
    model = mixtral()
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(st.SlimtuneError, match="sonicmoe"):
        st.attach(model, LORA)


def test_dropout_trains() -> None:
    model = mixtral()
    st.attach(model, st.LoRA(r=3, targets="experts", dropout=0.5))
    randomise(model, "default")
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_reference_parity(build: Any) -> None:
    import peft
    ours, theirs = build(), build()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=names, init_lora_weights=False)
        theirs = peft.get_peft_model(theirs, config).eval()
    st.attach(ours, st.LoRA(r=3, alpha=6, targets="experts"))
    for (path, param), op in ours.slim_state.adapters["default"].ops.items():
        layer = theirs.base_model.model.get_submodule(path)
        while layer.parameter_name != param:
            layer = layer.base_layer
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        E, b, _ = op.shape
        put_factors(op, A.view(E, 3, -1), B.view(b, 3, E).permute(2, 0, 1))  # the reference packs B's columns rank-major
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
