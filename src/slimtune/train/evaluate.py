"""Figures on held-out data: loss and perplexity of a causal LM, accuracy by candidate likelihood, and text classification.

When the answers of a data set come from a small set ("great" / "other"), the model's answer is the candidate it finds most
likely after the prompt. One forward over prompt + right answer gives loss and answer together when the candidates differ in a
single token; otherwise every candidate is scored by the sum of its log-probabilities. Of more than 20 candidates the answer is written
token by token, the likeliest each time among those that still lead to a candidate: a few forwards a row, however many there are.
Rows are sorted by length, so little is padding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimtune.train.candidates import Candidates, answer_of
from slimtune.train.formats import MANY
from slimtune.train.loss import logits_at, supervised
from slimtune.train.problems import PROBLEMS, problem_of, targets_of
from slimtune.train.shapes import CLASS
from slimtune.train.tokens import IGNORE

_SHOWN = 100  # a table of more classes is no figure that anybody reads, and grows with their square
Advance = Callable[[int], None]
Answer = tuple[int, float]  # which label, and its lead over the next


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one data set.

    Attributes:
        examples: how many rows were measured.
        loss: mean cross-entropy in nats, per supervised token (causal LM) or per example (classifier).
        accuracy: share of right answers; None when the answers are free text.
        macro_f1: mean F1 over the labels, each counting the same.
        labels: the candidates' names, in the order of `confusion`.
        confusion: rows = right label, columns = prediction.
        margins: by how much each answer's log-probability leads over the next best, in nats.
        predictions: index into `labels` of each example's answer, in the order of the data.
        tokens: how many tokens the loss is a mean of (causal LM).
        others: further figures by name (several labels at once, scores).
        words: each example's answer in words, where it is not one of `labels`.
    """

    examples: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    labels: list[str] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    predictions: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    tokens: int = 0
    others: dict[str, float] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        """exp(loss) of a causal LM; None of a classifier."""
        return math.exp(min(self.loss, 700.0)) if self.tokens else None

    def figures(self) -> dict[str, float]:
        """The scalars by name: accuracy first if there is one; perplexity of free text only (of a choice it says nothing)."""
        found = {"accuracy": self.accuracy, "macro F1": self.macro_f1, "loss": self.loss}
        found = {**self.others, **found}
        if self.accuracy is None:
            found["perplexity"] = self.perplexity
        return {k: v for k, v in found.items() if v is not None}


def length_sorted_batches(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Batches of row numbers, longest rows first (a batch that does not fit fails at once, not at the end).

    Args:
        lengths: tokens of each row.
        rows: rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def answers(scores: Tensor) -> list[Answer]:
    """The best column of each row of scores [n, labels], and its lead over the second best."""
    best = scores.topk(2, dim=1)
    return list(zip(best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist(), strict=True))


def _mine(n: int) -> list[int]:
    """The rows that this process measures: every one, or every k-th of k processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return list(range(torch.distributed.get_rank(), n, torch.distributed.get_world_size()))
    return list(range(n))


def _together(total: float, tokens: int, predicted: dict[int, Any]) -> tuple[float, int, dict[int, Any]]:
    """Sums and answers of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, tokens, predicted
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (total, tokens, predicted))
    return sum(t for t, _, _ in parts), sum(n for _, n, _ in parts), {i: p for _, _, d in parts for i, p in d.items()}


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value cache; afterwards everything is as before."""
    training = {m for m in model.modules() if m.training}
    config: Any = getattr(model, "config", None)
    cached = config.use_cache if hasattr(config, "use_cache") else None
    model.eval()
    if cached is not None:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
        if cached is not None:
            config.use_cache = cached


def pad_rows(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Rows of unequal length as one tensor [b, t], padded on the right."""
    width = max(len(r) for r in rows)
    return torch.tensor([[*r, *[value] * (width - len(r))] for r in rows], dtype=torch.long, device=device)


def _inputs(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    ones = [[1] * len(r) for r in rows]
    return {"input_ids": pad_rows(rows, pad, device), "attention_mask": pad_rows(ones, 0, device)}


def evaluate_causal(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    pad: int,
    candidates: Candidates | None = None,
    batch_rows: int = 16,
    advance: Advance | None = None,
) -> Evaluation:
    """Loss of a causal LM on its supervised tokens and, with candidates, how often its likeliest answer is right.

    Args:
        model: the causal LM, with whatever adapter is in force.
        examples: rows with input_ids and labels (-100 where nothing is asked).
        pad: the padding token.
        candidates: the possible answers, from `token_candidates`.
        batch_rows: rows of one batch.
        advance: called with the number of rows just measured.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    number = {answer: i for i, answer in enumerate(candidates.answers)} if candidates else {}
    gold = [number.get(answer_of(e), -1) for e in examples] if candidates else []
    predicted: dict[int, Any] = {}
    mine = _mine(len(examples))
    with measuring(model):
        one_forward = candidates is None or candidates.single_token
        choose = _best_candidates if candidates is None or len(candidates.answers) <= MANY else _written
        for part in length_sorted_batches([len(examples[i]["input_ids"]) for i in mine], batch_rows):
            batch = [mine[k] for k in part]
            rows = [examples[i] for i in batch]
            inputs = _inputs([r["input_ids"] for r in rows], pad, device)
            labels = pad_rows([r["labels"] for r in rows], IGNORE, device)
            positions = supervised(labels)
            if not bool(positions.any()):
                continue
            logits = logits_at(model, inputs, positions).float()  # [n, V]
            targets = labels[:, 1:][positions[:, :-1]]
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
            tokens += targets.numel()
            if candidates is not None and one_forward:
                counts = positions.sum(dim=1)
                first = torch.cumsum(counts, 0) - counts + len(candidates.prefix)  # row of the deciding position
                choice = torch.tensor([c[0] for c in candidates.cores], device=device)
                deciding = logits[first.clamp(max=logits.shape[0] - 1)][:, choice]  # [b, candidates]
                for i, p in zip(batch, answers(deciding), strict=True):
                    predicted[i] = p
            if candidates is not None and not one_forward:
                for i, p in zip(batch, choose(model, rows, candidates, pad, batch_rows, device), strict=True):
                    predicted[i] = p
            if advance is not None:
                advance(len(batch))
    names = list(candidates.names) if candidates else []
    total, tokens, predicted = _together(total, tokens, predicted)
    return _figures(len(examples), total / max(1, tokens), gold, predicted, names, tokens)


def _best_candidates(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], candidates: Candidates, pad: int, batch_rows: int, device: torch.device
) -> list[Answer]:
    prompts = [r["input_ids"][: len(r["input_ids"]) - len(answer_of(r))] for r in rows]
    pairs = [(i, c) for i in range(len(rows)) for c in range(len(candidates.answers))]
    keep = [a[: len(a) - len(candidates.suffix)] for a in candidates.answers]
    texts = [[*prompts[i], *keep[c]] for i, c in pairs]
    scores = torch.empty(len(rows), len(keep))
    for batch in length_sorted_batches([len(t) for t in texts], batch_rows):
        labels = pad_rows([[*[IGNORE] * len(prompts[pairs[k][0]]), *keep[pairs[k][1]]] for k in batch], IGNORE, device)
        positions = supervised(labels)
        logits = logits_at(model, _inputs([texts[k] for k in batch], pad, device), positions).float()
        targets = labels[:, 1:][positions[:, :-1]]
        each = F.cross_entropy(logits, targets, reduction="none")
        row_of = positions.nonzero()[:, 0]
        sums = torch.zeros(len(batch), device=device).index_add_(0, row_of, -each)
        for k, s in zip(batch, sums.tolist(), strict=True):
            scores[pairs[k]] = s
    return answers(scores)


def _written(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], candidates: Candidates, pad: int, batch_rows: int, device: torch.device
) -> list[Answer]:
    tree: dict[Any, Any] = {}
    for i, answer in enumerate(candidates.answers):
        node = tree
        for token in answer:
            node = node.setdefault(token, {})
        node[None] = i
    texts = [list(r["input_ids"][: len(r["input_ids"]) - len(answer_of(r))]) for r in rows]
    nodes, leads = [tree] * len(rows), [float("inf")] * len(rows)
    while open_rows := [i for i, node in enumerate(nodes) if None not in node]:
        undecided = [i for i in open_rows if len(nodes[i]) > 1]
        for i in set(open_rows) - set(undecided):  # one way on: nothing to ask
            (token, nodes[i]), *_ = nodes[i].items()
            texts[i].append(token)
        for part in length_sorted_batches([len(texts[i]) for i in undecided], batch_rows):
            batch = [undecided[k] for k in part]
            last = torch.zeros(len(batch), max(len(texts[i]) for i in batch), dtype=torch.bool, device=device)
            for k, i in enumerate(batch):
                last[k, len(texts[i]) - 1] = True
            logits = logits_at(model, _inputs([texts[i] for i in batch], pad, device), last).float()  # [b, V]
            for i, row in zip(batch, logits, strict=True):
                ways = list(nodes[i])
                best, lead = answers(row[torch.tensor(ways, device=device)].unsqueeze(0))[0]
                texts[i].append(ways[best])
                nodes[i], leads[i] = nodes[i][ways[best]], min(leads[i], lead)
    return [(node[None], lead) for node, lead in zip(nodes, leads, strict=True)]


def evaluate_classifier(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    pad: int,
    names: Sequence[str],
    batch_rows: int = 16,
    advance: Advance | None = None,
) -> Evaluation:
    """Loss of a text classifier, with accuracy, macro-F1 and confusion of classes, or the figures of its kind of `problem`.

    Args:
        model: a sequence classifier, with whatever adapter is in force.
        examples: rows with input_ids and label (the class number, a mark for each label, or a score).
        pad: the padding token.
        names: the classes in the order of the model's outputs.
        batch_rows: rows of one batch.
        advance: called with the number of rows just measured.
    """
    device = next(model.parameters()).device
    problem = problem_of(model)
    gold = [e["label"] for e in examples]
    predicted: dict[int, Any] = {}
    total, mine = 0.0, _mine(len(examples))
    one_class = problem is PROBLEMS[CLASS]
    with measuring(model):
        for part in length_sorted_batches([len(examples[i]["input_ids"]) for i in mine], batch_rows):
            batch = [mine[k] for k in part]
            logits = model(**_inputs([examples[i]["input_ids"] for i in batch], pad, device))["logits"].float()  # [b, outputs]
            targets = targets_of([gold[i] for i in batch], device)
            total += float(problem.loss(logits, targets)) * len(batch) / targets.numel()
            predicted |= dict(zip(batch, answers(logits) if one_class else problem.answers(logits), strict=True))
            if advance is not None:
                advance(len(batch))
    total, _, predicted = _together(total, 0, predicted)
    loss = total / max(1, len(examples))
    if one_class:
        return _figures(len(examples), loss, gold, predicted, list(names), 0)
    found = [predicted[i] for i in range(len(examples))]
    words = [problem.words(answer, names) for answer in found]
    return Evaluation(examples=len(examples), loss=loss, others=problem.figures(found, gold), words=words)


def _figures(n: int, loss: float, gold: list[int], found: dict[int, Answer], names: list[str], tokens: int) -> Evaluation:
    if not names:
        return Evaluation(examples=n, loss=loss, tokens=tokens)
    from sklearn.metrics import confusion_matrix, f1_score

    predicted = [found[i][0] for i in range(n)]
    known = [(g, p) for g, p in zip(gold, predicted, strict=True) if g >= 0]
    right = sum(g == p for g, p in known)
    everything = list(range(len(names)))
    g, p = [g for g, _ in known], [p for _, p in known]
    return Evaluation(
        examples=n,
        loss=loss,
        tokens=tokens,
        labels=names,
        predictions=predicted,
        margins=[round(found[i][1], 6) for i in range(n)],
        accuracy=right / max(1, n),  # an answer outside the candidates cannot be got right
        macro_f1=float(f1_score(g, p, labels=everything, average="macro", zero_division=0.0)) if known else 0.0,
        confusion=confusion_matrix(g, p, labels=everything).tolist() if known and len(names) <= _SHOWN else None,
    )
