"""Files of the reference from before transformers moved modules: the same names today, or the same numbers elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import slimtune as st
from slimtune.core.errors import MismatchError

IDS = torch.arange(14).view(2, 7) + 3
HEAD = "base_model.model."


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8, projection_dim=32
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)).eval()


@pytest.mark.parametrize("dora", [False, True])
def test_the_text_part_of_a_vision_language_model(dora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=".*language_model.*(q|v)_proj", init_lora_weights=False, use_dora=dora)
    theirs: Any = peft.get_peft_model(llava(), config).eval()
    want = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    old = {k.replace("model.model.language_model.", "model.language_model.model."): v for k, v in load_file(path).items()}
    assert old.keys() != load_file(path).keys()
    save_file(old, path, {"format": "pt"})
    ours = llava()
    report = st.load(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert not report.notes, "transformers' own renaming is no guess"
    st.save(ours, tmp_path / "again")
    st.load(llava(), tmp_path / "again")


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, num_local_experts=4
    )
    return MixtralForCausalLM(config).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100, num_experts=4,
        num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


MOES = {"mixtral": (mixtral, "block_sparse_moe", ("w1", "w3", "w2")), "qwen": (qwen, "mlp", ("gate_proj", "up_proj", "down_proj"))}


def old_experts(name: str, folder: Path, parts: tuple[str, ...], stabilised: bool = False, drop: str = "") -> Any:
    """Write pairs for experts that are layers of their own, and return the model with their deltas in its weights."""
    make, block, (_, up, down) = MOES[name]
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    want = make()
    scale = 4 / 2**0.5 if stabilised else 4 / 2
    for layer in range(2):
        experts = want.model.layers[layer].mlp.experts
        for e in range(4):
            for part in parts:
                shape = (32, 48) if part == down else (48, 32)
                at = f"{HEAD}model.layers.{layer}.{block}.experts.{e}.{part}"
                A, B = torch.randn(2, shape[1], generator=generator) * 0.2, torch.randn(shape[0], 2, generator=generator) * 0.2
                if f".{layer}.{block}.experts.{e}.{part}" != drop:
                    tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
                with torch.no_grad():
                    weight = experts.down_proj[e] if part == down else experts.gate_up_proj[e].chunk(2, 0)[int(part == up)]
                    weight.add_(scale * B @ A)
        q = f"{HEAD}model.layers.{layer}.self_attn.q_proj"
        A, B = torch.randn(2, 32, generator=generator) * 0.2, torch.randn(32, 2, generator=generator) * 0.2
        tensors |= {f"{q}.lora_A.weight": A, f"{q}.lora_B.weight": B}
        with torch.no_grad():
            want.model.layers[layer].self_attn.q_proj.weight.add_(scale * B @ A)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*parts, "q_proj"], "use_rslora": stabilised, "peft_version": "0.17.0"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return want


@pytest.mark.parametrize("stabilised", [False, True], ids=["plain", "rank-stabilized"])
@pytest.mark.parametrize("which", [slice(0, 3), slice(0, 1), slice(2, 3)], ids=["all", "gate", "down"])
@pytest.mark.parametrize("name", list(MOES))
def test_experts_that_were_layers_of_their_own(name: str, which: slice, stabilised: bool, tmp_path: Path) -> None:
    make, _, parts = MOES[name]
    want = old_experts(name, tmp_path, parts[which], stabilised)(IDS).logits
    ours = make()
    st.load(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-5)
    st.save(ours, tmp_path / "again")
    again = make()
    st.load(again, tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)
    st.merge(again, keep=False)
    torch.testing.assert_close(again(IDS).logits, want, rtol=1e-3, atol=1e-4)


def test_experts_of_which_some_are_missing_are_refused(tmp_path: Path) -> None:
    old_experts("mixtral", tmp_path, ("w1", "w3", "w2"), drop=".1.block_sparse_moe.experts.2.w3")
    with pytest.raises(MismatchError, match=r"1 experts' layers of model.layers.1.mlp.experts.gate_up_proj"):
        st.load(mixtral(), tmp_path)


def test_modules_that_moved_for_no_known_reason_are_found_by_the_end_of_their_paths_and_it_is_said(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
            self.body = LlamaForCausalLM(config).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).logits

    plain = Wrapped().body
    theirs: Any = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    want = theirs(IDS).logits
    theirs.save_pretrained(tmp_path)
    ours = Wrapped()
    report = st.load(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), want, rtol=1e-5, atol=1e-5)
    assert any("model.layers.0.self_attn.q_proj is body.model.layers.0.self_attn.q_proj" in note for note in report.notes)


def test_another_model_is_refused_as_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    theirs: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="does not have"):
        st.load(mixtral(), tmp_path)
