"""What the outputs of a text classifier mean, by transformers' `problem_type`: one class of several, several labels at once, or a score.

    single_label_classification   cross-entropy
    multi_label_classification    binary cross-entropy of each label, all the same weight
    regression                    squared error
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimtune.train.models import ProblemType
from slimtune.train.shapes import CLASS, SCORE, SEVERAL


@dataclass(frozen=True)
class Problem:
    """One meaning of a classifier's outputs.

    Attributes:
        type: transformers' name of it.
        stored: the type of a row's target in a table, as pyarrow calls it.
        encode: (label of a row, class -> index) -> target.
        loss: (logits [n, outputs], targets) -> sum over the targets' numbers.
        answers: logits -> one answer for each row.
        words: (answer or target, class names) -> text.
        figures: (answers, targets) -> figures by name.
    """

    type: ProblemType
    stored: str
    encode: Callable[[Any, dict[str, int]], Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    answers: Callable[[Tensor], list[Any]]
    words: Callable[[Any, Sequence[str]], str]
    figures: Callable[[list[Any], list[Any]], dict[str, float]]


def _marks(labels: list[str], index: dict[str, int]) -> list[float]:
    there = {index[label] for label in labels}
    return [float(i in there) for i in range(len(index))]


def _named(marks: Sequence[float], names: Sequence[str]) -> str:
    return ", ".join(name for name, on in zip(names, marks, strict=True) if on) or "(none)"


def _shares(found: list[Any], wanted: list[Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    f1 = {f"{average} F1": float(f1_score(wanted, found, average=average, zero_division=0.0)) for average in ("micro", "macro")}
    return {"all labels right": sum(f == w for f, w in zip(found, wanted, strict=True)) / len(wanted), **f1}


def _distances(found: list[float], wanted: list[float]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    figures = {"mean absolute error": sum(abs(f - w) for f, w in zip(found, wanted, strict=True)) / len(wanted)}
    if len(set(found)) > 1 and len(set(wanted)) > 1:
        figures |= {"Pearson": float(pearsonr(found, wanted)[0]), "Spearman": float(spearmanr(found, wanted)[0])}
    return {name: value for name, value in figures.items() if math.isfinite(value)}


PROBLEMS = {
    CLASS: Problem(
        "single_label_classification",
        "int32",
        lambda label, index: index[label],
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"),
        lambda logits: [int(i) for i in logits.argmax(dim=1)],
        lambda answer, names: names[answer],
        lambda found, wanted: {},  # `Evaluation` has its own: accuracy, F1, confusion
    ),
    SEVERAL: Problem(
        "multi_label_classification",
        "list<float>",
        _marks,
        lambda logits, targets: F.binary_cross_entropy_with_logits(logits, targets, reduction="sum"),
        lambda logits: [[float(on) for on in row] for row in (logits > 0).tolist()],
        _named,
        _shares,
    ),
    SCORE: Problem(
        "regression",
        "float",
        lambda label, index: float(label),
        lambda logits, targets: F.mse_loss(logits.squeeze(-1), targets, reduction="sum"),
        lambda logits: [float(x) for x in logits.squeeze(-1)],
        lambda answer, names: f"{answer:.3g}",
        _distances,
    ),
}
_BY_TYPE: dict[str, Problem] = {problem.type: problem for problem in PROBLEMS.values()}


def problem_type(format: str) -> ProblemType:
    """Return transformers' `problem_type` of rows of this format."""
    return PROBLEMS[format if format in PROBLEMS else CLASS].type


def problem_of(model: nn.Module) -> Problem:
    """Return what a classifier's outputs mean, as its configuration says; one class of several if it says nothing."""
    config: Any = getattr(model, "config", None)
    return _BY_TYPE.get(getattr(config, "problem_type", None) or "", PROBLEMS[CLASS])


def targets_of(targets: Sequence[Any], device: torch.device) -> Tensor:
    """Return rows' targets as a tensor: classes [n] (int64), labels [n, k] or scores [n] (float32)."""
    return torch.tensor(list(targets), device=device)
