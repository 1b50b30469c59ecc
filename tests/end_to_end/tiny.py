"""Tiny random models with a real tokenizer, and small data sets, made on the spot: no network, a second of work."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "apple", "stone", "river", "cloud", "table", "quick", "slow", "warm", "cold"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the usual special tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator([f"{w} {w} answer: yes no" for w in WORDS] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def llama(folder: Path, width: int = 32) -> Path:
    """A Llama of two layers in a folder."""
    tok = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A BERT classifier's body of two layers in a folder."""
    tok = tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def reviews(folder: Path, train: int = 48, test: int = 16, seed: int = 0) -> Path:
    """text + label rows that can be learnt: the label says whether `red` is in the text."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for name, n in (("train", train), ("valid", test), ("test", test)):
        rows = []
        for i in range(n):
            words = [draw.choice(WORDS[1:]) for _ in range(draw.randint(3, 9))]
            if i % 2:
                words[draw.randrange(len(words))] = "red"
            rows.append({"text": " ".join(words), "label": "yes" if i % 2 else "no"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(folder: Path, **settings: object) -> Path:
    """A recipe file; settings win over small defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, object] = {
        "method": "lora",
        "r": 4,
        "dtype": "float32",
        "epochs": 2,
        "batch_size": 8,
        "lr": 0.01,
        "log_every": 1,
        "warmup": 0,
        "max_length": 48,
        "prompt_template": '"{text}\\nanswer:"',
    }
    values |= settings
    if "max_steps" in values:
        del values["epochs"]
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{k}: {v}\n" for k, v in values.items()))
    return path
