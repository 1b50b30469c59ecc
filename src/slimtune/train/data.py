"""From a recipe's data to tokenised splits: `input_ids`, `labels` (masked with -100), and `label` where there is a class.

Decisions, the same everywhere:
- A completion (and a plain text that was not cut) ends with the end-of-text token, with loss: so generation knows where to stop.
  Where answers are a choice among few, that token is common to all of them and drops out when they are compared.
- A too long row loses part of its prompt (the review, not the template around it), never of its completion; a chat loses its
  oldest turns. A row whose completion alone does not fit is left out and counted in `notes`.
- Samples (`limit_*`, the held-out rows) do not depend on the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train.examples import Maker, maker
from slimtune.train.formats import (
    MANY,
    Format,
    check_labels,
    find_candidates,
    find_labels,
    normalise,
    recognise,
)
from slimtune.train.read import SPLITS, Source, hold_out, read_splits, sample
from slimtune.train.tokens import Encoder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from slimtune.train.models import Task
    from slimtune.train.recipe import Recipe


@dataclass(frozen=True)
class Rows:
    """Every split's checked rows, not yet tokenised.

    Attributes:
        splits: "train", and "valid" / "test" where there are any: columns by our names.
        sources: where each came from, for messages.
        format: which of the four shapes.
        labels: the classes (text + label only), in the order of their indices.
    """

    splits: dict[str, Dataset]
    sources: dict[str, Source]
    format: Format
    labels: list[str]


@dataclass(frozen=True)
class DataBundle:
    """Tokenised data.

    Attributes:
        train, valid, test: columns input_ids, labels (causal LM), label (index into `labels`, where there are any).
        format: messages | prompt+completion | text+label | text.
        labels: class names by index; empty if the data have none.
        candidates: the possible completions, if they are a choice among at most 20; in the order of `labels` if there are any.
        raw: split -> the rows in words, in the same order as the tokenised ones.
        max_length: tokens per example at most.
        notes: what was shortened or left out, one sentence each.
    """

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    format: Format
    labels: list[str]
    candidates: list[str] | None
    raw: dict[str, Dataset]
    max_length: int
    notes: list[str] = field(default_factory=list)


def read_rows(recipe: Recipe) -> Rows:
    """Read, recognise, check and sample the rows of every split.

    Raises:
        DataError: see `read_splits`, `recognise`, `normalise` and `check_labels`.
    """
    sources = read_splits(recipe)
    format = recognise(sources["train"], recipe)
    splits = {split: normalise(source, format, recipe) for split, source in sources.items()}
    labels = find_labels(splits["train"], sources["train"]) if format == "text+label" else []
    for split, rows in splits.items():
        if labels and split != "train":
            check_labels(rows, labels, sources[split])
    if "valid" not in splits:
        rest, held = hold_out(Source(splits["train"], sources["train"].name), recipe.valid_fraction)
        if held is not None and len(rest.rows):
            splits["train"], splits["valid"], sources["valid"] = rest.rows, held.rows, held
    limits = {"train": recipe.limit_train, "valid": recipe.limit_valid, "test": recipe.limit_test}
    return Rows({split: sample(splits[split], limits[split]) for split in SPLITS if split in splits}, sources, format, labels)


def tokenise(rows: Rows, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Task, longest: int | None = None) -> DataBundle:
    """Tokenise every split.

    Args:
        rows: from `read_rows`.
        recipe: for max_length, truncate and the templates.
        tokenizer: the model's.
        task: "causal_lm" or "classification".
        longest: tokens the model takes at most (`max_positions`), or None.

    Raises:
        DataError: max_length is more than the model takes, or no row of a split fits into it.
    """
    done: dict[str, Dataset] = {}
    raw: dict[str, Dataset] = {}
    notes: list[str] = []
    for split in rows.splits:
        done[split], raw[split], said = tokenise_split(rows, split, recipe, tokenizer, task, longest)
        notes += said
    candidates = None
    if task == "causal_lm" and 2 <= len(rows.labels) <= MANY:
        candidates = [recipe.completion_template.format(label=label) for label in rows.labels]
    elif rows.format == "prompt+completion":
        candidates = find_candidates(rows.splits["train"]["completion"])
    return DataBundle(
        train=done["train"],
        valid=done.get("valid"),
        test=done.get("test"),
        format=rows.format,
        labels=rows.labels,
        candidates=candidates,
        raw=raw,
        max_length=fit_length(recipe, longest),
        notes=notes,
    )


def tokenise_split(
    rows: Rows,
    split: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    longest: int | None = None,
    count: int | None = None,
) -> tuple[Dataset, Dataset, list[str]]:
    """Return (examples, the rows they came from, notes) of one split; arguments and errors as of `tokenise`.

    Args:
        count: only the first so many rows (to look at them).
    """
    max_length = fit_length(recipe, longest)
    make = maker(rows, recipe, Encoder(tokenizer), task, max_length)
    dataset = rows.splits[split]
    if count is not None:
        dataset = dataset.select(range(min(count, len(dataset))))
    return _map(dataset, make, rows.sources[split].name, split, max_length)


def fit_length(recipe: Recipe, longest: int | None) -> int:
    """Return the tokens per example: what the recipe says, or 512, or less if the model takes less.

    Raises:
        DataError: the recipe asks for more than the model takes.
    """
    if longest is not None and recipe.max_length is not None and recipe.max_length > longest:
        raise DataError(f"max_length: {recipe.max_length} is more than the model takes, {longest} tokens", hint=f"max_length: {longest}")
    return recipe.max_length or min(512, longest or 512)


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Task, longest: int | None = None) -> DataBundle:
    """Read and tokenise a recipe's data: `tokenise(read_rows(recipe), ...)`."""
    return tokenise(read_rows(recipe), recipe, tokenizer, task, longest)


def _map(dataset: Dataset, make: Maker, name: str, split: str, max_length: int) -> tuple[Dataset, Dataset, list[str]]:
    """Tokenise one split; return it with the rows it came from, and notes on what was lost."""
    from datasets import Dataset as Table
    from datasets import Features, List, Value

    kept: list[int] = []
    notes: list[str] = []
    columns: dict[str, list[Any]] = {}
    shortened = 0
    for i, row in enumerate(dataset):
        try:
            made = make(row)
        except DataError as error:
            raise DataError(error.what, where=f"{name}, row {i + 1} of those used; {error.where}", hint=error.hint) from error
        if made is None:
            continue
        example, cut = made
        shortened += cut
        kept.append(i)
        for key, value in example.items():
            columns.setdefault(key, []).append(value)
    dropped = len(dataset) - len(kept)
    if not kept:
        raise DataError(
            f"no row fits into max_length: {max_length} tokens without cutting off its completion",
            where=name,
            hint="raise max_length",
        )
    if shortened:
        notes.append(f"{split}: {shortened} of {len(kept)} rows were shortened to max_length: {max_length} tokens")
    if dropped:
        notes.append(f"{split}: {dropped} of {len(dataset)} rows were left out: their completion alone exceeds max_length: {max_length}")
    kinds = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "label": Value("int32")}
    features = Features({key: kinds[key] for key in columns})
    return Table.from_dict(columns, features=features), dataset.select(kept) if dropped else dataset, notes
