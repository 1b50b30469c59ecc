"""What `merge`, `generate` and `chat` open: a run, or an adapter's folder, such as `combine`, `convert` and `extract` write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import SpecError

if TYPE_CHECKING:
    from slimtune.train.reopen import Reopened


def open_trained(path: str, model: str | None, *, rows: bool = False, quantize: str | None = None) -> Reopened:
    """Open a run or an adapter with its base.

    Args:
        path: the run folder, or an adapter's.
        model: the base, as a recipe names it; for an adapter's folder only. None: what the adapter's config says.
        rows: whether the run's data are needed; an adapter has none.
        quantize: instead of the run's own setting.

    Raises:
        SpecError: a run with another model, or an adapter where data are needed.
        SlimtuneError: it cannot be opened.
    """
    from slimtune.train.reopen import reopen

    if not (Path(path) / "adapter_config.json").is_file():
        if model is not None:
            raise SpecError("a run knows its model; --model goes with an adapter's folder", where=path, hint=f"--model with {path}/adapter")
        return reopen(path, rows=rows, quantize=quantize)
    if rows:
        raise SpecError("an adapter's folder holds no examples to start from", where=path, hint='--prompt "TEXT"')
    return _open_adapter(path, model)


def _open_adapter(path: str, model: str | None) -> Reopened:
    import slimtune as st
    from slimtune.cli.open_base import load, name_of, named_base
    from slimtune.train.job import Job
    from slimtune.train.models import load_tokenizer, resolve_model
    from slimtune.train.quiet import quiet
    from slimtune.train.recipe import Recipe
    from slimtune.train.reopen import Reopened
    from slimtune.train.runs import RunFolder

    source, cls, changes = named_base(path, model)
    name = name_of(path)
    with quiet():
        base: Any = load(source, cls, changes)
        tokenizer = load_tokenizer(resolve_model(source))
        st.load(base, path, name=name)
    writes = hasattr(base, "generate") and cls != "AutoModelForSequenceClassification"
    job = Job(
        Recipe(model=source, name=name),
        resolve_model(source),
        "causal_lm" if writes else "classification",
        base,
        tokenizer,
        "messages" if tokenizer.chat_template else "text",
        list((base.config.id2label or {}).values()) if not writes else [],
        None,
    )
    return Reopened(RunFolder(Path(path)), job, name)
