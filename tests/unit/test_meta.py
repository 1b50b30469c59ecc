"""Models that are only shapes: attaching takes no memory, and knows everything it must know."""

import pytest
import torch

import slimtune as st
from slimtune.testing.matrix import own_methods
from slimtune.testing.zoo import ARCHITECTURES, llama_70b


def test_lora_on_a_70b_llama_without_its_weights() -> None:
    model = llama_70b()
    report = st.attach(model, st.LoRA(r=16))
    h, inner, kv = 8192, 28672, 1024
    widths = [(h, h), (h, kv), (h, kv), (h, h), (h, inner), (h, inner), (inner, h)]
    assert len(report.rows) == 80 * 7
    assert report.trainable == 80 * sum(16 * (a + b) for a, b in widths)
    assert report.total - report.trainable == sum(p.numel() for p in llama_70b().parameters())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "parameters of an adapter on a half-precision base"
    assert report.base_bytes == 2 * (report.total - report.trainable)
    with torch.no_grad(), st.use(model, rows=["default", None]):
        out = model.model.layers[0].mlp(torch.empty(2, 4, h, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (2, 4, h)
    st.detach(model, "default")
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("name", own_methods())
def test_every_method_attaches_to_a_model_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = next(a for a in ARCHITECTURES if a.name == "Llama").make()
    report = st.attach(model, st.methods()[name]())
    assert report.trainable > 0
    assert all(p.is_meta for p in model.parameters())
