"""From a recipe's data to tokenised splits: `input_ids`, `labels` (masked with -100), and `label` where there is a class.

Decisions, the same everywhere:
- A completion (and a plain text that was not cut) ends with the end-of-text token, with loss: so generation knows where to stop.
  Where answers are a choice among few, that token is common to all of them and drops out when they are compared.
- A too long row loses part of its prompt (the review, not the template around it), never of its completion; a chat loses its
  oldest turns. A row whose completion alone does not fit is left out and counted in `notes`.
- Samples (`limit_*`, the held-out rows) do not depend on the seed.
- Whatever of a row is not used is named in `notes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError
from slimtune.train.data_notes import chat_notes, number_notes
from slimtune.train.examples import Example, Maker, maker
from slimtune.train.formats import alike, check_labels, find_candidates, find_labels, normalise
from slimtune.train.plain import plain
from slimtune.train.problems import PROBLEMS
from slimtune.train.read import SPLITS, Source, hold_out, read_splits, sample
from slimtune.train.shapes import CHAT, CLASS, PAIR, SCORE, recognise
from slimtune.train.tables import write_table
from slimtune.train.tokens import IGNORE, Encoder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from slimtune.train.models import Task
    from slimtune.train.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """What a finished run knows of the data that it was trained on: their format, classes, and answers (None: not known)."""

    format: str
    labels: list[str]
    candidates: list[str] | None = None


@dataclass(frozen=True)
class Rows:
    """Every split's checked rows, not yet tokenised.

    Attributes:
        splits: "train", and "valid" / "test" where there are any: columns by our names.
        sources: where each came from, for messages.
        format: messages | prompt+completion | text+label | text+labels | text+score | text.
        labels: the classes (where there are any), in the order of their indices.
        notes: what is not used, and what looks odd.
        digests: split -> SHA-256 of its rows as they are used.
    """

    splits: dict[str, Dataset]
    sources: dict[str, Source]
    format: str
    labels: list[str]
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    candidates: list[str] | None = None


@dataclass(frozen=True)
class DataBundle:
    """Tokenised data.

    Attributes:
        train, valid, test: columns input_ids, labels (causal LM), label (index into `labels`, marks or a score, where there are any);
            train is empty where a finished run is measured.
        format: messages | prompt+completion | text+label | text+labels | text+score | text.
        labels: class names by index; empty if the data have none.
        candidates: the possible completions, if they are a choice among few, or classes; in the order of `labels` if there are any.
        answers: the tokens of each candidate.
        raw: split -> the rows in words, in the same order as the tokenised ones.
        max_length: tokens per example at most.
        notes: what was shortened, left out or is not used, one sentence each.
        digests: split -> SHA-256 of its rows as they are used.
    """

    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    format: str
    labels: list[str]
    candidates: list[str] | None
    answers: list[list[int]]
    raw: dict[str, Dataset]
    max_length: int
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def read_rows(recipe: Recipe, trained: Trained | None = None) -> Rows:
    """Read, recognise, check and sample the rows of every split.

    Args:
        recipe: what to read.
        trained: of a finished run that is to be measured: then only the held-out rows are read, and its classes hold.

    Raises:
        DataError: see `read_splits`, `recognise`, `normalise` and `check_labels`.
    """
    sources = read_splits(recipe, "train" if trained is None else "")
    if trained is not None:
        held = next((split for split in ("test", "valid") if split in sources), None)
        sources = {held: sources[held]} if held is not None else {"train": sources["train"]}
    first = sources.get("train") or next(iter(sources.values()))
    shape = recognise(first, recipe)
    if trained is not None and shape.format != trained.format:
        raise DataError(f"these rows are {shape.format}, and the run was trained on {trained.format}", where=first.name)
    checked = {split: normalise(source, shape) for split, source in sources.items()}
    splits = {split: c.rows for split, c in checked.items()}
    notes = [f"read as {shape.said}"] if shape.said else []
    for split, source in sources.items():
        notes += [f"{split}: {note}" for note in source.notes]
        if checked[split].unused:
            notes.append(f"{split}: not used: {', '.join(map(plain, checked[split].unused))}")
    labels = trained.labels if trained is not None else []
    if trained is None and "label" in splits["train"].column_names and shape.format != SCORE:
        labels = find_labels(splits["train"], sources["train"])
        notes += alike(labels)
        notes += number_notes(labels, shape.format)
    for split, rows in splits.items():
        if labels and (split != "train" or trained is not None):
            check_labels(rows, labels, sources[split])
    if "valid" not in splits and "train" in splits:
        rest, held_rows = hold_out(splits["train"], recipe.valid_fraction)
        if held_rows is not None and len(rest):
            splits["train"], splits["valid"] = rest, held_rows
            sources["valid"] = Source(f"{sources['train'].name} (held out)", sources["train"].parts, (), ())
    if trained is not None:
        splits.pop("train", None)
    limits = {"train": recipe.limit_train, "valid": recipe.limit_valid, "test": recipe.limit_test}
    return Rows(
        splits={split: sample(splits[split], limits[split]) for split in SPLITS if split in splits},
        sources=sources,
        format=shape.format,
        labels=labels,
        notes=notes,
        digests={split: c.digest for split, c in checked.items()},
        candidates=trained.candidates if trained is not None else None,
    )


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
    notes = [*rows.notes]
    for split in rows.splits:
        done[split], raw[split], said = tokenise_split(rows, split, recipe, tokenizer, task, longest)
        notes += [note for note in said if note not in notes]
    candidates = rows.candidates
    if task == "causal_lm" and rows.format == CLASS:
        candidates = [recipe.completion_template.format(label=label) for label in rows.labels]
    elif rows.format == PAIR and "train" in rows.splits:
        candidates = find_candidates(rows.splits["train"]["completion"])
    return DataBundle(
        train=done["train"] if "train" in done else write_table([], _schema(rows.format, task)),
        valid=done.get("valid"),
        test=done.get("test"),
        format=rows.format,
        labels=rows.labels,
        candidates=candidates if task == "causal_lm" else None,
        answers=_answers(rows, recipe, tokenizer, candidates, fit_length(recipe, longest)) if task == "causal_lm" and candidates else [],
        raw=raw,
        max_length=fit_length(recipe, longest),
        notes=notes,
        digests=rows.digests,
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
    encoder = Encoder(tokenizer)
    make = maker(rows, recipe, encoder, task, max_length)
    dataset = rows.splits[split]
    if count is not None:
        dataset = dataset.select(range(min(count, len(dataset))))
    examples, words, notes = _map(dataset, make, rows, split, max_length, _schema(rows.format, task))
    if rows.format == CHAT:
        notes += chat_notes(dataset, examples, encoder)
    return examples, words, notes


def fit_length(recipe: Recipe, longest: int | None) -> int:
    """Return the tokens per example: what the recipe says, or 512, or less if the model takes less.

    Raises:
        DataError: the recipe asks for more than the model takes.
    """
    if longest is not None and recipe.max_length is not None and recipe.max_length > longest:
        raise DataError(f"max_length: {recipe.max_length} is more than the model takes, {longest} tokens", hint=f"max_length: {longest}")
    return recipe.max_length or min(512, longest or 512)


def load_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, task: Task, longest: int | None = None, trained: Trained | None = None
) -> DataBundle:
    """Read and tokenise a recipe's data: `tokenise(read_rows(recipe, trained), ...)`."""
    return tokenise(read_rows(recipe, trained), recipe, tokenizer, task, longest)


def _schema(format: str, task: Task) -> Any:
    import pyarrow as pa

    kinds = {"int32": pa.int32(), "float": pa.float32(), "list<float>": pa.list_(pa.float32())}
    ids = pa.list_(pa.int32())
    if task == "classification":
        return pa.schema([("input_ids", ids), ("label", kinds[PROBLEMS[format].stored])])
    return pa.schema([("input_ids", ids), ("labels", ids), *([("label", pa.int32())] if format == CLASS else [])])


def _answers(rows: Rows, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, candidates: list[str], max_length: int) -> list[list[int]]:
    """Return the tokens of each candidate as they follow the prompt of some row."""
    if not rows.splits:
        return []
    words = next(iter(rows.splits.values()))
    make = maker(rows, recipe, Encoder(tokenizer), "causal_lm", max_length)
    found = []
    for i, text in enumerate(candidates):
        row = {"text": words[0]["text"], "label": rows.labels[i]} if rows.format == CLASS else {"prompt": words[0]["prompt"], "completion": text}
        found += [[t for t in made["labels"] if t != IGNORE] for made, _ in make(row)]
    return found


def _map(dataset: Dataset, make: Maker, rows: Rows, split: str, max_length: int, schema: Any) -> tuple[Dataset, Dataset, list[str]]:
    """Tokenise one split; return it with the rows it came from, and notes on what was lost."""
    name = rows.sources[split].name
    kept: list[int] = []
    shortened = 0

    def examples() -> Iterator[Example]:
        nonlocal shortened
        for i, row in enumerate(dataset):
            try:
                found = make(row)
            except DataError as error:
                raise DataError(error.what, where=f"{name}, row {i + 1} of those used; {error.where}", hint=error.hint) from error
            for example, cut in found:
                shortened += cut
                kept.append(i)
                yield example

    table = write_table(examples(), schema)
    if not kept:
        raise DataError(
            f"no row fits into max_length: {max_length} tokens without cutting off its completion",
            where=name,
            hint="raise max_length",
        )
    notes: list[str] = []
    used = len(set(kept))
    if shortened:
        notes.append(f"{split}: {shortened} of {len(kept)} rows were shortened to max_length: {max_length} tokens")
    if used < len(dataset):
        left = len(dataset) - used
        notes.append(f"{split}: {left} of {len(dataset)} rows were left out: their completion alone exceeds max_length: {max_length}")
    if used < len(kept):
        notes.append(f"{split}: {used} conversations give {len(kept)} examples, one for each answer: the chat template rewrites earlier turns")
    return table, dataset.select(kept) if kept != list(range(len(dataset))) else dataset, notes
