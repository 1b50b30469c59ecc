"""Files of trained tokens in both directions with the reference library, alone and beside a LoRA; outputs equal to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import bert, config_in, gpt2, llama, ours_and_back, output, shake, t5, theirs_and_back, zoo
from safetensors.torch import load_file
from torch import nn

import slimtune as st


def tied() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=13, max_position_embeddings=16, num_hidden_layers=2,
        intermediate_size=24, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def alone(**options: Any) -> peft.PeftConfig:
    return peft.TrainableTokensConfig(**({"token_indices": [7, 1, 4]} | options))


def beside(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [7, 1, 4]} | options))


THEIRS = {
    "table": (llama, alone()),
    "table and tied head": (tied, alone()),
    "Conv1D model": (gpt2, alone()),
    "table of an encoder": (bert, alone()),
    "encoder-decoder": (t5, alone()),
    "by name": (zoo, alone(target_modules=["emb"])),
    "by regex": (llama, alone(target_modules=r".*embed_tokens")),
    "head too": (llama, alone(target_modules=["embed_tokens", "lm_head"])),
    "random rows": (llama, alone(init_weights=False)),
    "LoRA": (llama, beside()),
    "LoRA, tied": (tied, beside()),
    "LoRA, tied, said": (tied, beside(ensure_weight_tying=True)),
    "LoRA, by name": (zoo, beside(target_modules=["q"], trainable_token_indices={"emb": [3, 2]})),
    "LoRA, two tables": (llama, beside(trainable_token_indices={"embed_tokens": [3, 2], "lm_head": [5]})),
    "LoRA, a head": (bert, beside(target_modules=["query"], task_type="SEQ_CLS")),
    "LoRA, biases": (gpt2, beside(target_modules=["c_attn"], bias="lora_only")),
    "DoRA": (tied, beside(use_dora=True)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_here_and_back(case: str, tmp_path: Path) -> None:
    make, config = THEIRS[case]
    mine = theirs_and_back(make, config, tmp_path)
    ops = mine.slim_state.adapters["default"].ops
    assert {key for key, op in ops.items() if op.method == "trainable_tokens"} >= ({("lm_head", "weight")} if make is tied else set())


OURS = {
    "table": (llama, st.TrainableTokens(tokens=(3, 9, 1)), "TRAINABLE_TOKENS"),
    "special tokens": (llama, st.TrainableTokens(), "TRAINABLE_TOKENS"),
    "tied": (tied, st.TrainableTokens(tokens=(3, 9)), "TRAINABLE_TOKENS"),
    "T5": (t5, st.TrainableTokens(tokens=(3, 9)), "TRAINABLE_TOKENS"),
    "BERT": (bert, st.TrainableTokens(tokens=(3, 9), train_modules=()), "TRAINABLE_TOKENS"),
    "head apart": (llama, st.TrainableTokens(tokens=(3, 9), head="train"), "TRAINABLE_TOKENS"),
    "LoRA": (tied, st.Union(of=(st.LoRA(r=4), st.TrainableTokens(tokens=(3, 9)))), "LORA"),
    "LoRA, head apart": (llama, st.Union(of=(st.LoRA(r=4), st.TrainableTokens(tokens=(3, 9), head="train"))), "LORA"),
    "DoRA": (tied, st.Union(of=(st.DoRA(), st.TrainableTokens(tokens=(3, 9)))), "LORA"),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_there_and_back(case: str, tmp_path: Path) -> None:
    make, spec, kind = OURS[case]
    ours_and_back(make, spec, tmp_path, kind)


ONLY_OURS = {
    "a tied head with a bias": (None, st.TrainableTokens(tokens=(3, 9))),
    "a full module beside it": (bert, st.TrainableTokens(tokens=(3, 9), train_modules="classifier")),
    "a LoRA on the same table": (llama, st.Union(of=(st.LoRA(r=4, targets="embed_tokens"), st.TrainableTokens(tokens=(3, 9))))),
}


@pytest.mark.parametrize("case", ONLY_OURS)
def test_what_only_we_can_say(case: str, tmp_path: Path) -> None:
    make, spec = ONLY_OURS[case]
    make = make or masked
    live = make()
    st.attach(live, spec)
    shake(live.parameters())
    want = output(live)
    st.save(live, tmp_path)
    assert config_in(tmp_path)["peft_type"].startswith("SLIMTUNE_")
    st.load(mine := make(), tmp_path)
    assert (output(mine) - want).abs().max() < 1e-6


def masked() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=13, max_position_embeddings=16
    )
    model = transformers.BertForMaskedLM(config).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


@pytest.mark.parametrize("config", [alone(token_indices=[13, 14]), beside(trainable_token_indices=[13, 14])], ids=["alone", "LoRA"])
def test_tokens_that_this_vocabulary_has_not(config: Any, tmp_path: Path) -> None:
    grown = tied()
    grown.resize_token_embeddings(15)
    live = peft.get_peft_model(grown, config)
    shake(live.parameters())
    live.save_pretrained(str(tmp_path))
    want = output(live.eval())
    mine = tied()
    with pytest.raises(st.SlimtuneError, match=r"2 token\(s\) beyond this vocabulary") as caught:
        st.load(mine, tmp_path)
    assert "model.resize_token_embeddings(15)" in str(caught.value.hint)
    mine.resize_token_embeddings(15)
    st.load(mine, tmp_path)
    assert (output(mine) - want).abs().max() < 1e-5


def test_the_file_holds_the_rows_alone(tmp_path: Path) -> None:
    live = tied()
    st.attach(live, st.TrainableTokens(tokens=(3, 9)))
    shake(live.parameters())
    st.save(live, tmp_path)
    (rows,) = load_file(tmp_path / "adapter_model.safetensors").values()
    st.merge(live)
    assert torch.equal(rows, live.model.embed_tokens.weight[[3, 9]])
    assert torch.equal(rows, live.lm_head.weight[[3, 9]])


def test_damage_is_named(tmp_path: Path) -> None:
    import json

    live = peft.get_peft_model(llama(), alone())
    live.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for wrong in ([1, 4], [1, 1, 4], [7, 1, 99], [-1, 2, 3], "x", []):
        path.write_text(json.dumps(config | {"token_indices": wrong}))
        model = llama()
        with pytest.raises(st.SlimtuneError):
            st.load(model, tmp_path)
        assert "slim_state" not in model.__dict__
