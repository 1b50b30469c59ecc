"""Everything a recipe needs before the first step: rows, model and tokenised data, in the order that finds mistakes soonest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimtune.train.data import DataBundle, read_rows, tokenise
from slimtune.train.models import ResolvedModel, Task, decide_task, load_config, load_model, max_positions, resolve_model
from slimtune.train.new_tokens import extend
from slimtune.train.problems import problem_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimtune.methods.trainable_tokens import TrainableTokens
    from slimtune.train.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe's model and data, ready to attach an adapter and train.

    Attributes:
        resolved: where the model's files are.
        task: "causal_lm" or "classification".
        model, tokenizer: loaded, with the recipe's new tokens.
        data: tokenised rows.
        new: what trains the rows of these tokens; None if there are none.
    """

    resolved: ResolvedModel
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataBundle
    new: TrainableTokens | None


def prepare(recipe: Recipe, *, empty: bool = False, say: Callable[[str], None] = print) -> Prepared:
    """Read the data, then find and load the model, then tokenise.

    Args:
        recipe: a validated recipe.
        empty: build the model on the meta device, without weights (for checking and counting).
        say: called with one line of progress.

    Raises:
        SlimtuneError: anything that is wrong with the data or the model.
    """
    rows = read_rows(recipe)
    resolved = resolve_model(recipe.model, base=Path.cwd(), say=say)
    config = load_config(resolved)
    task = decide_task(recipe.task, config, rows.format)
    model, tokenizer = load_model(
        resolved,
        task=task,
        labels=rows.labels if task == "classification" else (),
        problem=problem_type(rows.format),
        dtype=recipe.dtype,
        quantize=recipe.quantize,
        empty=empty,
    )
    new = extend(recipe, model, tokenizer)
    return Prepared(resolved, task, model, tokenizer, tokenise(rows, recipe, tokenizer, task, max_positions(config)), new)
