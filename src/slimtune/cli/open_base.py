"""The base model that adapters on the disk belong to, for commands that compute with them: no tokenizer, no data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import FileError, RecipeError

if TYPE_CHECKING:
    from torch import nn

_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip


def adapter_folder(name: str) -> Path:
    """Return an adapter's folder, given it or the run folder above it.

    Raises:
        FileError: there is none.
    """
    folder = Path(name)
    if (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if not folder.is_dir():
        raise FileError(f"there is no folder {name}", where=str(folder.absolute()), hint="name an adapter's folder, or that of its run")
    return folder


def open_base(adapter: str, model: str | None) -> nn.Module:
    """Load the base model of an adapter.

    Args:
        adapter: its folder, or that of its run.
        model: the base as a recipe names it; None: what the run's recipe or the adapter's config says.

    Raises:
        RecipeError: the adapter does not say.
        FileError: the model cannot be loaded.
    """
    if model is None and (Path(adapter) / "adapter").is_dir():
        return _of_run(adapter)
    return load(*named_base(adapter, model))


def named_base(adapter: str, model: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Return the source, transformers class and changed config fields of an adapter's base, as `load` takes them.

    Args:
        adapter, model: as for `open_base`.

    Raises:
        RecipeError: the adapter does not say.
    """
    from slimtune.files.adapter import read
    from slimtune.files.layouts.reference import HEADS

    file, _, config, _ = read(adapter_folder(adapter), frozenset())
    config = config or {}
    source = model or config.get("base_model_name_or_path")
    if not source:
        raise RecipeError("the adapter does not name its base model", where=adapter, hint="--model NAME_OR_FOLDER")
    task = config.get("task_type")
    ends = tuple(f"{head}.weight" for head in HEADS.get(str(task), ()))
    labels = next((e.shape[0] for name, e in file.entries.items() if ends and name.endswith(ends) and len(e.shape) == 2), None)
    return str(source), _AUTO.get(str(task)), {} if labels is None else {"num_labels": labels}


def load(source: str, cls: str | None, changes: dict[str, Any], dtype: Any = "auto") -> nn.Module:
    """Load a model.

    Args:
        source: as a recipe names it.
        cls: its transformers class; None: what its config says.
        changes: fields of its config.
        dtype: of its weights; "auto": as they are stored.

    Raises:
        RecipeError, FileError: there is no such model, or it cannot be loaded.
    """
    import transformers

    from slimtune.train.convert import quiet_transformers
    from slimtune.train.models import _explained, _local_only, check_weights, load_config, resolve_model

    resolved = resolve_model(source)
    config = load_config(resolved)
    if resolved.origin != "hub":
        check_weights(Path(resolved.path_or_hub_id))
    name = cls or (config.architectures or ["AutoModel"])[0]
    if not hasattr(transformers, name):
        raise FileError(f"transformers has no {name}", where=source, hint="upgrade transformers, or use st.combine and its kin in Python")
    for key, value in changes.items():
        setattr(config, key, value)
    transformers.set_seed(0)  # a head that the checkpoint lacks is the same each time
    with _explained(resolved), quiet_transformers():
        made: nn.Module = getattr(transformers, name).from_pretrained(
            resolved.path_or_hub_id,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=_local_only(resolved),
            **({"trust_remote_code": False} if name.startswith("Auto") else {}),
        )
    return made.eval()


def _of_run(run: str) -> nn.Module:
    import slimtune as st
    from slimtune.train.reopen import reopen

    opened = reopen(run, rows=False, quantize="none")
    if opened.adapter is None:
        raise FileError("this run trained every weight: it holds no adapter", where=run, hint="slimtune extract BASE RUN/model OUT makes one")
    model: nn.Module = opened.job.model
    st.detach(model, opened.adapter)
    return model


def name_of(out: str) -> str:
    """Return an adapter's name made from its folder's."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in Path(out).name)[:100].lstrip("-")
    return name or "adapter"
