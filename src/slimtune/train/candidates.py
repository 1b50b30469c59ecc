"""Answers that are a choice among few, as tokens: what they share, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimtune.train.tokens import IGNORE

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """A small set of possible answers.

    Attributes:
        answers: the token sequences.
        names: the same as text, without surrounding spaces.
        prefix: tokens that all of them start with.
        suffix: tokens that all of them end with (the end-of-text token); left out of the comparison.
    """

    answers: tuple[Tokens, ...]
    names: tuple[str, ...]
    prefix: Tokens = ()
    suffix: Tokens = ()

    @property
    def cores(self) -> list[Tokens]:
        """What distinguishes them: the answers without common prefix and suffix."""
        return [a[len(self.prefix) : len(a) - len(self.suffix)] for a in self.answers]

    @property
    def single_token(self) -> bool:
        """True when one position decides."""
        return all(len(c) == 1 for c in self.cores)


def answer_of(example: Mapping[str, Any]) -> Tokens:
    """The supervised tokens of an example."""
    return tuple(t for t in example["labels"] if t != IGNORE)


def token_candidates(examples: Iterable[Mapping[str, Any]], decode: Callable[[Tokens], str]) -> Candidates | None:
    """The distinct answers of a data set whose answers are a choice among few, as tokens; None if they cannot be compared.

    Args:
        examples: rows with labels, every row's supervised part one piece at its end.
        decode: tokens to text, without special tokens.
    """
    # Their order numbers them: it must not depend on how often each is seen, since a run that is opened again sees other rows.
    answers = sorted({answer_of(e) for e in examples}, key=lambda a: (decode(a).strip(), a))
    prefix = _common(answers) if answers else ()
    if len(answers) < 2 or any(len(a) == len(prefix) for a in answers):
        return None
    suffix = _common([a[len(prefix) :][::-1] for a in answers])[::-1]
    if any(len(a) == len(prefix) + len(suffix) for a in answers):
        suffix = ()  # one answer is the beginning of another: what ends it is what tells them apart
    return Candidates(tuple(answers), tuple(decode(a).strip() for a in answers), prefix, suffix)


def _common(sequences: Sequence[Tokens]) -> Tokens:
    shortest = min(len(s) for s in sequences)
    n = next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
    return sequences[0][:n]
