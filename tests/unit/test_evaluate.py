"""Figures on held-out data, against plain computations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from slimtune.train.candidates import token_candidates
from slimtune.train.evaluate import evaluate_causal, evaluate_classifier, length_sorted_batches, measuring
from slimtune.train.loss import causal_loss, logits_at, supervised
from slimtune.train.tokens import IGNORE

PAD = 0


def llama(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        **more,
    )
    return LlamaForCausalLM(config)


def gemma() -> Gemma2ForCausalLM:
    """A model that bends its logits after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        final_logit_softcapping=3.0,
    )
    return Gemma2ForCausalLM(config)


def rows(n: int, answers: list[list[int]]) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        prompt = torch.randint(5, 60, (3 + i % 5,), generator=draw).tolist()
        answer = answers[i % len(answers)]
        found.append({"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer})
    return found


def batch(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(e["input_ids"]) for e in examples)
    return {
        "input_ids": torch.tensor([e["input_ids"] + [PAD] * (width - len(e["input_ids"])) for e in examples]),
        "attention_mask": torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples]),
        "labels": torch.tensor([e["labels"] + [IGNORE] * (width - len(e["labels"])) for e in examples]),
    }


def log_likelihood(model: nn.Module, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logp = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    return sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(answer))


@pytest.mark.parametrize("build", [llama, gemma])
def test_loss_and_gradients_equal_the_models_own(build) -> None:  # type: ignore[no-untyped-def]
    model, inputs = build(), batch(rows(6, [[5, 6, 1], [7, 1]]))
    own = model(**inputs).loss
    own.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    mine = causal_loss(model, inputs, None)
    mine.backward()
    torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_only_supervised_positions_reach_the_head() -> None:
    model, inputs = llama(), batch(rows(6, [[5, 6, 1], [7, 1]]))
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    causal_loss(model, inputs, None)
    assert seen == [int((inputs["labels"] != IGNORE).sum())]


def test_items_of_the_whole_step_divide_the_sum() -> None:
    model, inputs = llama(), batch(rows(6, [[5, 6, 1], [7, 1]]))
    n = int((inputs["labels"] != IGNORE).sum())
    whole = causal_loss(model, inputs, torch.tensor(2 * n))
    torch.testing.assert_close(whole * 2, causal_loss(model, inputs, None))
    halves = [batch(rows(6, [[5, 6, 1], [7, 1]])[:2]), batch(rows(6, [[5, 6, 1], [7, 1]])[2:])]
    torch.testing.assert_close(sum(causal_loss(model, h, n) for h in halves), causal_loss(model, inputs, n))


def test_a_head_called_in_another_way_gets_the_plain_computation() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def get_output_embeddings(self) -> nn.Module:
            return nn.Linear(3, 3)  # never called

        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(**inputs).logits}

    model, inputs = Plain(), batch(rows(4, [[5, 1]]))
    positions = supervised(inputs["labels"])
    rest = {k: v for k, v in inputs.items() if k != "labels"}
    torch.testing.assert_close(logits_at(model, rest, positions), model.inner(**rest).logits[positions])


@pytest.mark.parametrize(
    "answers",
    [[[5, 1], [6, 1]], [[9, 5, 1], [9, 6, 1], [9, 7, 1]], [[5, 6, 1], [7, 1], [5, 8, 8, 1]], [[5, 1], [5, 5, 1]]],
    ids=["one token", "common prefix", "several tokens", "one begins the other"],
)
def test_accuracy_by_candidate_likelihood(answers: list[list[int]]) -> None:
    model, examples = llama(), rows(13, answers)
    found = token_candidates(examples, lambda t: " ".join(map(str, t)))
    assert found is not None
    assert sorted(found.answers) == sorted(tuple(a) for a in answers)
    assert found.single_token == all(len(c) == 1 for c in found.cores)
    result = evaluate_causal(model, examples, PAD, found, batch_rows=3)
    keep = len(found.suffix)
    for e, p in zip(examples, result.predictions, strict=True):
        prompt = [t for t, y in zip(e["input_ids"], e["labels"], strict=True) if y == IGNORE]
        scores = [log_likelihood(model, prompt, list(a[: len(a) - keep])) for a in found.answers]
        assert scores[p] >= max(scores) - 1e-5
    gold = [found.answers.index(tuple(t for t in e["labels"] if t != IGNORE)) for e in examples]
    assert result.accuracy == sum(g == p for g, p in zip(gold, result.predictions, strict=True)) / 13
    assert result.confusion is not None
    assert sum(map(sum, result.confusion)) == 13
    loss = causal_loss(model.eval(), batch(examples), None)
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_an_answer_that_was_never_trained_is_not_right() -> None:
    model, train = llama(), rows(8, [[5, 1], [6, 1]])
    found = token_candidates(train, str)
    result = evaluate_causal(model, rows(4, [[40, 41, 1]]), PAD, found)
    assert result.accuracy == 0.0


def test_plain_text_has_loss_only() -> None:
    result = evaluate_causal(llama(), rows(5, [[5, 6, 1]]), PAD)
    assert result.accuracy is None
    assert set(result.figures()) == {"loss", "perplexity"}


def test_classifier_figures() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
        pad_token_id=PAD,
    )
    model = BertForSequenceClassification(config)
    examples = [{"input_ids": r["input_ids"], "label": i % 3} for i, r in enumerate(rows(10, [[5, 6]]))]
    result = evaluate_classifier(model, examples, PAD, ["a", "b", "c"], batch_rows=4)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits for e in examples])
    gold = torch.tensor([e["label"] for e in examples])
    assert result.predictions == logits.argmax(-1).tolist()
    assert result.accuracy == pytest.approx(float((logits.argmax(-1) == gold).float().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, gold)), rel=1e-5)
    assert result.perplexity is None


def test_batches_hold_every_row_once_longest_first() -> None:
    lengths = [3, 50, 7, 7, 20, 1, 33]
    batches = length_sorted_batches(lengths, 3)
    assert [[lengths[i] for i in b] for b in batches] == [[50, 33, 20], [7, 7, 3], [1]]
    assert sorted(i for b in batches for i in b) == list(range(7))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = llama(attention_dropout=0.1).train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    with measuring(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert model.config.use_cache
    assert model.training
    assert not model.model.layers[0].training
