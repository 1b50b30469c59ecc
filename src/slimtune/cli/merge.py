"""slimtune merge RUN_OR_ADAPTER --out DIR"""

from __future__ import annotations

import shutil


def run(run_dir: str, out: str, model: str | None = None) -> None:
    """Write a plain transformers checkpoint with the adapter folded in; slimtune is not needed to load it.

    Args:
        run_dir: the run folder, or an adapter's.
        out: a new or empty folder.
        model: the base of an adapter's folder; None: the one that it names.

    Raises:
        FileError: the folder is in use.
    """
    from slimtune.cli.open_adapter import open_trained
    from slimtune.cli.output import new_folder
    from slimtune.train.reopen import write_merged
    from slimtune.train.report import size
    from slimtune.train.runs import folder_bytes

    target = new_folder(out)
    opened = open_trained(run_dir, model, quantize="none")  # a plain checkpoint holds plain weights
    if opened.adapter is None:
        shutil.copytree(opened.folder.model, target, dirs_exist_ok=True)
    else:
        write_merged(opened, target)
    kind = "AutoModelForSequenceClassification" if opened.job.task == "classification" else "AutoModelForCausalLM"
    print(f"{target}: {size(folder_bytes(target))}. Load it with {kind}.from_pretrained({str(target)!r})")
