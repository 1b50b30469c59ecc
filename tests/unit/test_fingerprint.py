"""The fingerprint: blind to dtype, quantisation, adapters and merges; keen on another base and on one that was trained further."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import FormatError
from slimtune.files.fingerprint import Fingerprint, fingerprint

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def base(seed: int = 0, layers: int = 4, hidden: int = 64, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, **heads, **options)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.1)  # as in a trained model
    return model


def further(model: nn.Module, step: float, only: str = "") -> nn.Module:
    """Move the weights as a short training would."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(torch.randn_like(p) * p.std(), alpha=step)
    return model


def stored(f: Fingerprint) -> Fingerprint:
    return Fingerprint.from_dict(json.loads(json.dumps(f.to_dict())))


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_blind_to_dtype_but_not_to_training(a: torch.dtype, b: torch.dtype) -> None:
    saved = stored(fingerprint(base().to(a)))
    assert saved.compare(fingerprint(base().to(b))) == []
    assert saved.compare(fingerprint(further(base(), 1e-2).to(b)))
    assert "another model" in saved.compare(fingerprint(base(seed=1).to(b)))[0]


@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("only", ["", "norm", "embed", "mlp"])
def test_any_training_shows_within_a_dtype(step: float, only: str) -> None:
    said = fingerprint(base()).compare(fingerprint(further(base(), step, only)))
    assert "trained further" in said[0]
    assert only in said[0]


def test_training_shows_across_dtypes_from_a_thousandth_on() -> None:
    saved = stored(fingerprint(base()))
    assert saved.compare(fingerprint(further(base(), 1e-3).bfloat16()))


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_blind_to_quantisation(how: str) -> None:
    import bitsandbytes as bnb

    def quantised(model: nn.Module) -> nn.Module:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                size = (module.in_features, module.out_features)
                options = {"quant_type": "nf4"} if how == "nf4" else {"has_fp16_weights": False}
                new = (bnb.nn.Linear4bit if how == "nf4" else bnb.nn.Linear8bitLt)(*size, bias=False, **options)
                new.load_state_dict(module.state_dict())
                model.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], new.to("cpu"))
        return model

    plain, packed = stored(fingerprint(base())), stored(fingerprint(quantised(base().bfloat16())))
    assert plain.compare(fingerprint(quantised(base().bfloat16()))) == []
    assert packed.compare(fingerprint(base())) == []
    assert packed.compare(fingerprint(quantised(base().half()))) == []
    assert plain.compare(fingerprint(quantised(base(seed=1).bfloat16())))
    assert packed.compare(fingerprint(base(seed=1)))
    assert plain.compare(fingerprint(quantised(further(base(), 1e-2).bfloat16())))
    assert any("quantised weights" in d for d in plain.compare(fingerprint(quantised(further(base(), 2.0, "proj").bfloat16()))))


def test_blind_to_adapters_and_what_is_merged() -> None:
    model = base()
    before = fingerprint(model)
    st.attach(model, st.LoRA(r=4, train_modules="lm_head"))
    for p in model.slim_state.adapters["default"].parameters():
        nn.init.normal_(p)
    assert before.compare(fingerprint(model)) == []
    st.attach(model, st.Bottleneck(), name="other")
    assert before.compare(fingerprint(model)) == []
    st.merge(model, "default")
    with st.disabled(model):
        assert before.compare(fingerprint(model)) == []
    assert before.compare(fingerprint(model)) != []  # what the caller lifts out


def test_structure_is_told_in_words() -> None:
    said = fingerprint(base()).compare(fingerprint(base(layers=3, hidden=32)))
    assert "model.layers.*.mlp.up_proj.weight: 4 x 96x64 when it was saved, 3 x 96x32 here" in said
    assert "none" in fingerprint(base()).compare(fingerprint(nn.Linear(2, 2)))[0]


def test_what_is_left_out_does_not_count() -> None:
    a, b = base(), base()
    with torch.no_grad():
        b.lm_head.weight.normal_()
    assert fingerprint(a).compare(fingerprint(b))
    assert fingerprint(a, without=["lm_head"]).compare(fingerprint(b, without=["lm_head"])) == []


def test_the_cache_sees_every_change() -> None:
    model = base()
    one = fingerprint(model)
    assert fingerprint(model) is one
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    assert one.compare(fingerprint(model))
    two = fingerprint(model)
    model.bfloat16()
    assert fingerprint(model).types != two.types
    assert two.compare(fingerprint(model)) == []


def test_small_and_fast() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 4000}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=30))
    model.to_empty(device="cpu")
    seconds = []
    for _ in range(3):
        with torch.no_grad():
            model.model.embed_tokens.weight[0, 0] = 1.0  # the cache does not help
        begun = time.perf_counter()
        found = fingerprint(model)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.05
    assert len(json.dumps(found.to_dict())) < 6000


@pytest.mark.parametrize("broken", [{}, {"types": "ff", "values": "AAAA"}, {"types": "f", "values": "%"}, {"types": 3, "values": ""}])
def test_a_broken_one_is_an_error_of_ours(broken: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Fingerprint.from_dict({"structure": {}, **broken})
