"""Tiny random transformers of many architectures, for the unit tests of the core."""

from __future__ import annotations

import torch
from torch import nn


def _lm(cls: str, config: str, **options: object) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()


def llama(cls: str = "LlamaForCausalLM") -> nn.Module:
    return _lm(
        cls, "LlamaConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def mixtral() -> nn.Module:
    return _lm(
        "MixtralForCausalLM", "MixtralConfig", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=99, pad_token_id=0, experts_implementation="eager",
    )  # fmt: skip


def gpt2() -> nn.Module:
    return _lm(
        "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def bloom() -> nn.Module:
    return _lm("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, vocab_size=99)


def falcon() -> nn.Module:
    return _lm("FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)


def bert(cls: str = "BertForSequenceClassification") -> nn.Module:
    return _lm(
        cls, "BertConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        max_position_embeddings=64,
    )  # fmt: skip


def distilbert() -> nn.Module:
    return _lm("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=99)


def deberta() -> nn.Module:
    return _lm(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=99, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    )  # fmt: skip


def modernbert() -> nn.Module:
    return _lm(
        "ModernBertForSequenceClassification", "ModernBertConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=99, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def t5(gated: bool = False) -> nn.Module:
    return _lm(
        "T5ForConditionalGeneration", "T5Config", d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=99,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip


def bart() -> nn.Module:
    return _lm(
        "BartForConditionalGeneration", "BartConfig", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def vit() -> nn.Module:
    return _lm(
        "ViTForImageClassification", "ViTConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip


def whisper() -> nn.Module:
    return _lm(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
