"""A job: the model, tokenizer and data of one recipe, and what is asked of them: figures, prompts, samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from slimtune.core.errors import CapabilityError, DataError
from slimtune.train.bar import ProgressBar
from slimtune.train.candidates import Candidates, token_candidates
from slimtune.train.chat import end_of_turn
from slimtune.train.collate import Collator, length_grouped_order
from slimtune.train.evaluate import Evaluation, evaluate_causal, evaluate_classifier
from slimtune.train.formats import render_prompt
from slimtune.train.method_options import build_spec
from slimtune.train.tables import Examples
from slimtune.train.tokens import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimtune.core.spec import Spec
    from slimtune.methods.trainable_tokens import TrainableTokens
    from slimtune.train.data import DataBundle
    from slimtune.train.models import ResolvedModel
    from slimtune.train.recipe import Recipe

Row = dict[str, Any]


@dataclass
class Job:
    """A recipe with its model loaded.

    Attributes:
        recipe: what to do.
        resolved: where the model's files are.
        task: "causal_lm" or "classification".
        model, tokenizer: loaded.
        format: the data's shape: messages | prompt+completion | text+label | text+labels | text+score | text.
        labels: class names by index.
        data: tokenised rows; None when only the model is needed.
        new: what trains the rows of the recipe's new tokens; None if there are none.
        parameters, model_bytes: of the model as it was loaded.
    """

    recipe: Recipe
    resolved: ResolvedModel
    task: str
    model: Any
    tokenizer: Any
    format: str
    labels: list[str]
    data: DataBundle | None
    new: TrainableTokens | None = None
    parameters: int = 0
    model_bytes: int = 0
    dtype: torch.dtype = torch.float32
    _held_out: Sequence[Row] | None = field(default=None, repr=False)
    _valid: Sequence[Row] | None = field(default=None, repr=False)
    _candidates: list[Candidates | None] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        tensors = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}.values()
        self.parameters = int(self.model.num_parameters())
        self.model_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self.dtype = self.model.dtype
        if self.task == "causal_lm":
            stop_at(self.model, self.ends())

    # ---- data -----------------------------------------------------------------------------------------------------------
    @property
    def bundle(self) -> DataBundle:
        """The data, which this job was opened with."""
        assert self.data is not None, "this job was opened without data"
        return self.data

    @property
    def train_rows(self) -> Any:
        """Tokenised training rows (a table, memory-mapped where it is large)."""
        return self.bundle.train

    @property
    def valid_rows(self) -> Sequence[Row]:
        """Tokenised validation rows; empty when there are none."""
        if self._valid is None:
            self._valid = Examples(self.bundle.valid) if self.bundle.valid is not None else ()
        return self._valid

    def held_out(self) -> Sequence[Row]:
        """The rows that before and after are measured on: the test split, or else the validation split."""
        if self._held_out is None:
            self._held_out = Examples(self.bundle.test) if self.bundle.test is not None else self.valid_rows
        return self._held_out

    def held_out_words(self) -> Any:
        """The same rows in words."""
        return self.bundle.raw["test" if self.bundle.test is not None else "valid"]

    @property
    def collate(self) -> Collator:
        return Collator(self.tokenizer.pad_token_id)

    def first_batches(self) -> Iterator[Row]:
        """Batches for what starts from data: training rows in an order of their own, the same on every process of a run."""
        rows = self.train_rows
        order = length_grouped_order([1] * len(rows), self.recipe.batch_size, self.recipe.seed)
        for start in range(0, len(order), self.recipe.batch_size):
            yield self.collate([rows[i] for i in order[start : start + self.recipe.batch_size]])

    @property
    def candidates(self) -> Candidates | None:
        """The possible answers when they are a choice among few."""
        if not self._candidates:
            found = None
            if self.task == "causal_lm" and self.bundle.candidates is not None:
                seen = self.train_rows["labels"] if len(self.train_rows) else self.bundle.answers
                found = token_candidates(({"labels": labels} for labels in seen), lambda t: self.text(t))
            self._candidates.append(found)
        return self._candidates[0]

    # ---- figures --------------------------------------------------------------------------------------------------------
    def evaluate(self, rows: Sequence[Row], show: str = "") -> Evaluation:
        """Figures of the model, as it is now, on some rows.

        Args:
            rows: tokenised rows of this job's data.
            show: title of a progress bar; empty for none.

        Raises:
            DataError: there are no rows.
        """
        if not rows:
            raise DataError("there are no held-out rows to measure on", hint="give valid_file or test_file, or raise valid_fraction")
        size = self.recipe.eval_batch_size
        with ProgressBar(show, len(rows)) as advance:
            if self.task == "classification":
                return evaluate_classifier(self.model, rows, self.tokenizer.pad_token_id, self.labels, size, advance)
            return evaluate_causal(self.model, rows, self.tokenizer.pad_token_id, self.candidates, size, advance)

    # ---- words ----------------------------------------------------------------------------------------------------------
    @property
    def model_name(self) -> str:
        """The model's name without folders, package and ending."""
        last = self.recipe.model.replace("\\", "/").rstrip("/").split("/")[-1].split("#")[-1]
        return last.removesuffix(".gguf")

    @property
    def chats(self) -> bool:
        """True when the model was trained on conversations."""
        return self.format == "messages"

    def ends(self) -> list[int]:
        """The tokens that an answer ends with as it was trained: the end of text, and of conversations the template's end of turn."""
        turn = end_of_turn(Encoder(self.tokenizer)) if self.chats and self.tokenizer.chat_template is not None else None
        return [t for t in (self.tokenizer.eos_token_id, turn) if t is not None]

    def spec(self) -> Spec | None:
        """What to attach; None to train every weight."""
        return build_spec(self.recipe, self.task, self.new)

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def prompt_of(self, row: Row) -> list[int]:
        """A row's tokens up to its answer; of plain text, the first quarter."""
        ids = list(row["input_ids"])
        if self.format == "text":
            return ids[: max(1, len(ids) // 4)]
        first = next(i for i, t in enumerate(row["labels"]) if t != -100)
        return ids[:first]

    def prompt_tokens(self, text: str) -> list[int]:
        """What a user typed, put in the form that the model was trained on."""
        if self.chats:
            return self.turn_tokens([{"role": "user", "content": text}])
        encoder = Encoder(self.tokenizer)
        return encoder.begin(encoder.plain([render_prompt(self.recipe, self.format, text)])[0])

    def turn_tokens(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """A conversation, ready for the model's next turn."""
        out = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(out["input_ids"])

    def must_generate(self) -> None:
        """Raise unless the model can write text.

        Raises:
            CapabilityError: it is a classifier.
        """
        if self.task == "classification":
            raise CapabilityError("this model is a text classifier: it gives labels and cannot write", hint="slimtune eval RUN")


def stop_at(model: Any, tokens: Sequence[int]) -> None:
    """Make a model's generation stop at these tokens too; its generation_config says so from now on, also when it is saved or merged.

    Args:
        model: a causal LM.
        tokens: ids.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id
    stops = [] if known is None else [known] if isinstance(known, int) else list(known)
    stops += [t for t in tokens if t not in stops]
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None


def load_job(recipe: Recipe, say: Callable[[str], None]) -> Job:
    """Load a recipe's data and model.

    Raises:
        SlimtuneError: see `prepare`.
    """
    from slimtune.train.prepare import prepare

    p = prepare(recipe, say=say)
    for note in p.data.notes:
        say(f"note: {note}")
    return Job(recipe, p.resolved, p.task, p.model, p.tokenizer, p.data.format, p.data.labels, p.data, p.new)
