"""Open a finished run again: base model, adapter and, where asked for, its held-out rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError, FileError
from slimtune.train.job import Job
from slimtune.train.method_options import split_key
from slimtune.train.recipe import Recipe
from slimtune.train.runs import RunFolder, open_run, read_json
from slimtune.train.yaml_text import parse_flat

if TYPE_CHECKING:
    from slimtune.train.data import Trained


@dataclass(frozen=True)
class Reopened:
    """A run's model, as training left it.

    Attributes:
        folder: the run folder.
        job: model, tokenizer, data.
        adapter: the adapter's name; None when every weight was trained.
    """

    folder: RunFolder
    job: Job
    adapter: str | None


def stored_recipe(folder: RunFolder) -> Recipe:
    """The recipe a run was made with; the data it names need not exist any more.

    Raises:
        FileError: it is damaged.
    """
    entries, problems = parse_flat(folder.recipe.read_text(encoding="utf-8"))
    values = {k: e.value for k, e in entries.items() if e.value is not None}
    own = {k: v for k, v in values.items() if k in Recipe.model_fields and k != "options"}
    try:
        if problems:
            raise ValueError(problems[0])
        return Recipe(**own, options={split_key(k): v for k, v in values.items() if k not in own})
    except ValueError as e:
        raise FileError(f"the run's recipe is damaged: {str(e).splitlines()[0]}", where=str(folder.recipe)) from e


def reopen(run: str | Path, rows: bool, data: str | None = None, limit: int | None = None, quantize: str | None = None) -> Reopened:
    """Load a finished run.

    Args:
        run: the run folder.
        rows: whether its data are needed.
        data: other data to measure on, in any form a recipe takes.
        limit: at most this many rows of them.
        quantize: instead of the run's own setting.

    Raises:
        FileError: not a finished run.
        SlimtuneError: model, adapter or data cannot be loaded.
    """
    from transformers import set_seed

    import slimtune as st
    from slimtune.train.data import load_data
    from slimtune.train.models import load_config, load_model, max_positions, resolve_model
    from slimtune.train.new_tokens import extend
    from slimtune.train.problems import problem_type
    from slimtune.train.quiet import quiet
    from slimtune.train.sources import check_data_source

    folder = open_run(run)
    stored, results = stored_recipe(folder), read_json(folder.results)
    recipe = stored
    full = recipe.method == "full"
    changes: dict[str, Any] = {"quantize": quantize} if quantize else {}
    if data is not None:
        name, problems = check_data_source(data, Path.cwd())
        if problems:
            raise FileError(problems[0], where=data)
        changes |= _measured_on(name)
    if limit is not None:
        changes |= {"limit_test": limit, "limit_valid": limit}
    recipe = recipe.model_copy(update=changes)
    task, labels = results["task"], list(results["labels"])
    with quiet():
        resolved = resolve_model(str(folder.model) if full else recipe.model)
        set_seed(recipe.seed)  # a classifier's head was new then, and the adapter holds its difference to that
        model, tokenizer = load_model(
            resolved,
            task=task,
            labels=labels if task == "classification" else (),
            problem=problem_type(results["format"]),
            dtype=recipe.dtype,
            quantize=recipe.quantize,
        )
        new = None if full else extend(recipe, model, tokenizer)  # model/ has them, and its tokenizer too
        bundle = None
        if rows:
            bundle = load_data(recipe, tokenizer, task, max_positions(load_config(resolved)), _trained(results, stored))
        if not full:
            st.load(model, folder.adapter, name=str(recipe.name))
    model.eval()
    return Reopened(
        folder,
        Job(recipe, resolved, task, model, tokenizer, results["format"], labels, bundle, new),
        None if full else str(recipe.name),
    )


def _measured_on(name: str) -> dict[str, Any]:
    """The settings of a recipe that measures on other data: only these are read, so the run's own need not be there any more."""
    if Path(name).is_file():
        return {"data": None, "train_file": None, "valid_file": None, "test_file": name}
    return {"data": name, "train_file": None, "valid_file": None, "test_file": None}


def _trained(results: dict[str, Any], recipe: Recipe) -> Trained:
    """What a run knows of its training data; the answers of runs that did not keep them are looked up in these, if they are still there."""
    from slimtune.train.data import Trained
    from slimtune.train.formats import find_candidates

    answers = results.get("answers")
    if "answers" not in results and results["format"] == "prompt+completion" and (results.get("confusion") or {}).get("labels"):
        from slimtune.train.data import read_rows

        with contextlib.suppress(DataError):
            answers = find_candidates(read_rows(recipe).splits["train"]["completion"])
    return Trained(results["format"], list(results["labels"]), answers)


@contextlib.contextmanager
def bare(opened: Reopened) -> Iterator[None]:
    """The model without what it learnt."""
    import slimtune as st

    with st.disabled(opened.job.model):
        yield


def write_merged(opened: Reopened, out: Path) -> None:
    """Write the merged model with its tokenizer: a plain transformers folder.

    Args:
        opened: a run with an adapter.
        out: a new or empty folder.

    Raises:
        CapabilityError: the method cannot be merged.
    """
    import slimtune as st

    st.merge(opened.job.model, opened.adapter, out=out)
    opened.job.tokenizer.save_pretrained(out)
