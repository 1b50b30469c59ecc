"""Models that accelerate has dispatched or offloaded: adapters act, train, save and load as on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module, remove_hook_from_submodules
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune as st
from slimtune.files.fingerprint import fingerprint

CPU = torch.device("cpu")
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk", "lm_head": "cpu", "model.rotary_emb": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request: Any, tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, tie_word_embeddings=request.param
    )
    folder: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def plain(saved: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(saved).eval()


def mapped(saved: Path, tmp: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(saved, device_map=MAP, offload_folder=tmp / "mapped").eval()


def all_on_disk(saved: Path, tmp: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(saved, device_map={"": "disk"}, offload_folder=tmp / "disk").eval()


def offloaded(saved: Path, tmp: Path) -> Any:
    model = plain(saved)
    cpu_offload(model, execution_device=CPU)
    return model


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".slim." in f".{name}":
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def grads(model: Any) -> dict[str, torch.Tensor]:
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SPECS: list[Any] = [st.LoRA(r=2), st.DoRA(of=st.LoRA(r=2)), st.LoRA(r=2, init="pissa"), st.Bottleneck(), st.PromptTuning(tokens=3)]


@pytest.mark.parametrize("opened", [mapped, all_on_disk, offloaded])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{getattr(s, 'init', '')}")
def test_an_offloaded_base_takes_trains_and_saves_adapters(saved: Path, tmp_path: Path, opened: Callable[..., Any], spec: Any) -> None:
    reference = plain(saved)
    st.attach(reference, spec)
    fill(reference)
    want, expected = reference(IDS).logits, grads(reference)
    st.save(reference, tmp_path / "a")

    model = opened(saved, tmp_path)
    bare = model(IDS).logits
    st.load(model, tmp_path / "a", trainable=True)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-6)
    assert (want - bare).abs().max() > 1e-3
    got = grads(model)
    assert got.keys() == expected.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-5)
    st.save(model, tmp_path / "b")
    files = [(tmp_path / at / "adapter_model.safetensors").read_bytes() for at in "ab"]
    assert files[0] == files[1]  # the fingerprint of the base is in there
    st.detach(model, "default")
    assert torch.equal(model(IDS).logits, bare)
    st.attach(model, spec)
    fill(model)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-6)


def test_the_fingerprint_is_that_of_the_plain_model(saved: Path, tmp_path: Path) -> None:
    want = fingerprint(plain(saved)).to_dict()
    for opened in (mapped, all_on_disk, offloaded):
        model = opened(saved, tmp_path)
        assert fingerprint(model).to_dict() == want
        model(IDS)  # accelerate makes new parameters at each forward
        assert fingerprint(model).to_dict() == want


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_an_adapted_model_is_offloaded(saved: Path, tmp_path: Path, how: str) -> None:
    model = plain(saved)
    bare = model(IDS).logits
    st.attach(model, st.LoRA(r=2))
    fill(model)
    want = model(IDS).logits
    if how == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif how == "disk":
        disk_offload(model, tmp_path / "off", execution_device=CPU)
    else:
        dispatch_model(model, MAP, offload_dir=tmp_path / "off")
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-6)
    st.detach(model, "default")
    torch.testing.assert_close(model(IDS).logits, bare, rtol=1e-5, atol=1e-6)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(model(IDS).logits, bare, rtol=1e-5, atol=1e-6)


def test_merging_into_offloaded_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    model = offloaded(saved, tmp_path)
    st.attach(model, st.LoRA(r=2))
    for out in (None, tmp_path / "merged"):
        with pytest.raises(st.MergeError, match="without offloading"):
            st.merge(model, out=out)
    assert not (tmp_path / "merged").exists()


def test_a_block_that_is_brought_in_as_a_whole_is_refused(saved: Path) -> None:
    model = plain(saved)
    cpu_offload(model, execution_device=CPU, preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(st.SiteError, match="preload_module_classes"):
        st.attach(model, st.LoRA(r=2))
    assert "slim_state" not in model.__dict__


# ---- hooks, one at a time ---------------------------------------------------------------------------------------------
def pair() -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """Return a bare model, an adapted copy of it and an input."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = adapt(copy.deepcopy(base))
    return base, adapted, torch.randn(3, 4)


def adapt(model: nn.Sequential) -> nn.Sequential:
    st.attach(model, st.LoRA(r=2, targets="0"))
    fill(model)
    return model


def test_hooks_older_than_the_adapter() -> None:
    base, adapted, x = pair()
    model = copy.deepcopy(base)
    add_hook_to_module(model[0], ModelHook())
    before = dict(model[0].__dict__)
    adapt(model)
    assert torch.equal(model(x), adapted(x))
    assert not torch.equal(model(x), base(x))
    assert torch.equal(copy.deepcopy(model)(x), adapted(x))
    st.detach(model, "default")
    assert model[0].__dict__ == before
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), base(x))


def test_hooks_older_than_the_adapter_are_removed_under_it() -> None:
    base, adapted, x = pair()
    model = copy.deepcopy(base)
    add_hook_to_module(model[0], ModelHook())
    adapt(model)
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), adapted(x))
    st.detach(model, "default")
    assert torch.equal(model(x), base(x))


def test_hooks_younger_than_the_adapter() -> None:
    base, adapted, x = pair()
    model = adapt(copy.deepcopy(base))
    add_hook_to_module(model[0], ModelHook())
    add_hook_to_module(model[0], ModelHook(), append=True)
    assert torch.equal(model(x), adapted(x))
    st.detach(model, "default")
    assert torch.equal(model(x), base(x))  # accelerate still holds the forward that it found
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), base(x))
    assert type(model[0]) is nn.Linear
    assert torch.equal(adapt(model)(x), adapted(x))
