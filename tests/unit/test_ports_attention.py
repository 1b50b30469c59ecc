"""nn.MultiheadAttention with every option, torch's encoder fast path, parity with the reference library."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ports_props import check_all, check_bf16, check_gradients, check_rows, put_factors, randomise
from torch import nn

import slimtune as st

LORA = st.LoRA(r=3, targets="attention")
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {"batch_first": True},
    "sequence_first": {},
    "separate": {"kdim": 6, "vdim": 10, "batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "separate_no_bias": {"kdim": 6, "vdim": 10, "bias": False},
    "extra_keys": {"add_bias_kv": True, "add_zero_attn": True},
}


class Holder(nn.Module):
    """A model around one attention layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, **options)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        return self.attn(query, key, value, **kwargs)


def build(case: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    options = OPTIONS[case]
    torch.manual_seed(1)
    k, v = options.get("kdim", 8), options.get("vdim", 8)
    batch = {"query": torch.randn(4, 5, 8), "key": torch.randn(4, 6, k), "value": torch.randn(4, 6, v)}
    if not options.get("batch_first"):
        batch = {name: t.transpose(0, 1).contiguous() for name, t in batch.items()}
    return Holder(**options), batch


def call(model: nn.Module, batch: dict[str, Any]) -> Any:
    return model(**batch)


def cut(first: bool) -> Any:
    return lambda batch, s: {k: (t[s] if first else t[:, s]) if isinstance(t, torch.Tensor) else t for k, t in batch.items()}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("spec", [LORA, st.Dense(targets="attention"), st.BitFit(targets="attention", missing="add")], ids=str)
def test_properties(case: str, spec: st.Spec) -> None:
    model, batch = build(case)
    check_all(model, call, batch, spec)


@pytest.mark.parametrize("case", OPTIONS)
def test_rows(case: str) -> None:
    model, batch = build(case)
    first = bool(OPTIONS[case].get("batch_first"))
    check_rows(model, call, batch, cut(first), st.LoRA(r=3, targets="attention", up_bias=True), out_dim=0 if first else 1)


@pytest.mark.parametrize("first", [True, False])
def test_rows_with_masks_and_weights(first: bool) -> None:
    model, batch = build("packed" if first else "sequence_first")
    for name in "ab":
        st.attach(model, LORA, name=name)
        randomise(model, name)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, -1] = torch.tensor([True, False, True, False])
    for mask in (torch.rand(5, 6) > 0.8, torch.rand(8, 5, 6) > 0.8):
        for average in (True, False):
            options = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": average}
            with st.use(model, rows=["a", None, "b", "a"]):
                mixed, weights = model(**batch, **options)
            for i, which in enumerate(["a", None, "b", "a"]):
                alone = cut(first)(batch, slice(i, i + 1))
                own = mask if mask.dim() == 2 else mask[2 * i : 2 * i + 2]
                with st.use(model, which):
                    y, w = model(**alone, key_padding_mask=padding[i : i + 1], attn_mask=own, average_attn_weights=average)
                torch.testing.assert_close(mixed[i] if first else mixed[:, i], y[0] if first else y[:, 0], atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(weights[i], w[0], atol=1e-6, rtol=1e-5)
    with st.use(model, rows=["a", None, "b", "a"]):
        assert model(**batch, need_weights=False)[1] is None


def test_gradients() -> None:
    model, batch = build("packed")
    check_gradients(model, call, {k: t[:1, :2].double() for k, t in batch.items()}, LORA)
    model, batch = build("separate_no_bias")
    check_gradients(model, call, {k: t[:2, :1].double() for k, t in batch.items()}, LORA)


def test_bf16() -> None:
    model, batch = build("packed")
    check_bf16(model, call, {k: t.bfloat16() for k, t in batch.items()}, LORA)


def test_unbatched_and_compile() -> None:
    model, batch = build("packed")
    st.attach(model, LORA)
    randomise(model, "default")
    y, w = model(**batch)
    alone, own = model(**{k: t[1] for k, t in batch.items()})
    torch.testing.assert_close(alone, y[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own, w[1], atol=1e-6, rtol=1e-5)
    with st.use(model, rows=["default", None]), pytest.raises(st.SlimtuneError, match="unbatched"):
        model(**{k: t[1] for k, t in batch.items()})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch)[0], y)
    with st.use(model, rows=["default", None, "default", None]):
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0])


def test_refusals() -> None:
    with pytest.raises(st.SlimtuneError, match="cannot be dropped"):
        st.attach(build("packed")[0], st.LoRA(targets="attention", dropout=0.1))
    with pytest.raises(st.SlimtuneError, match=r"matches no module|cannot carry"):
        st.attach(build("packed")[0], st.LoRA(targets=("out_proj",)))


# ---- torch's encoder layers ------------------------------------------------------------------------------------------
def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


@pytest.mark.parametrize("targets", ["all-linear", "attention", ("linear1",), ("layers.1.linear2",)])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_fast_path(targets: Any, padded: bool) -> None:
    model = nn.Sequential(encoder()).requires_grad_(False)
    slow = copy.deepcopy(model)
    x = torch.randn(3, 5, 8)
    options = {"src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3], [4]])} if padded else {}
    real = torch.arange(5) < torch.tensor([[5], [3], [4]]) if padded else torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        base = model[0](x, **options)
        st.attach(model, st.LoRA(r=2, targets=targets))
        assert type(model[0]).__name__ == "TransformerEncoder"
        randomise(model, "default")
        live = model[0](x, **options)
        assert (live - base)[real].abs().max() > 1e-3
        st.attach(slow, st.LoRA(r=2, targets=targets))
        own = slow.slim_state.adapters["default"]
        for p, q in zip(own.parameters(), model.slim_state.adapters["default"].parameters(), strict=True):
            p.copy_(q)
        slow.train()  # no fast path at all
        torch.testing.assert_close(live[real], slow[0](x, **options)[real], atol=1e-5, rtol=1e-4)
        with st.disabled(model):
            assert torch.equal(model[0](x, **options), base)
        twin = copy.deepcopy(model)
        assert torch.equal(twin[0](x, **options), live)
        st.merge(model, "default")
        torch.testing.assert_close(model[0](x, **options)[real], live[real], atol=1e-5, rtol=1e-4)
        st.unmerge(model)
        with st.use(model, rows=["default", None, "default"]):
            mixed = model[0](x, **options)
        torch.testing.assert_close(mixed[1][real[1]], base[1][real[1]], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[0], live[0], atol=1e-5, rtol=1e-4)
        st.detach(model, "default")
        assert torch.equal(model[0](x, **options), base)
    assert type(model[0]) is nn.TransformerEncoder
    assert type(model[0].layers[0]) is nn.TransformerEncoderLayer
    assert "slim_switch" not in model[0].__dict__


# ---- the reference library -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["packed", "sequence_first", "no_bias"])
def test_reference_parity(case: str) -> None:
    import peft
    ours, batch = build(case)
    theirs = copy.deepcopy(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn"], init_lora_weights=False)).eval()
    layer = theirs.base_model.model.attn
    out = layer.base_layer.out_proj
    st.attach(ours.eval(), st.LoRA(r=3, alpha=6, targets="attention"))
    ops = {op.param: op for op in ours.slim_state.adapters["default"].ops.values()}
    for param, source in (("in_proj_weight", layer), ("out_proj", out)):
        A, B = source.lora_A["default"].weight, source.lora_B["default"].weight
        assert (A.shape, B.shape) == (ops[param].A.shape, ops[param].B.shape)
        put_factors(ops[param], A, B)
    ops["out_proj"].scale *= 2  # the reference (0.21.2) adds the output projection's delta twice, in its forward and in its merge
    y, w = ours(**batch)
    y2, w2 = theirs(**batch)
    torch.testing.assert_close(y, y2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(w, w2, atol=1e-5, rtol=1e-5)
