"""slimtune merge RUN --out DIR"""

from __future__ import annotations

import shutil
from pathlib import Path


def run(run_dir: str, out: str) -> None:
    """Write a plain transformers checkpoint with the adapter folded in; slimtune is not needed to load it.

    Args:
        run_dir: the run folder.
        out: a new or empty folder.

    Raises:
        FileError: the folder is in use.
    """
    from slimtune.core.errors import FileError
    from slimtune.train.reopen import reopen, write_merged
    from slimtune.train.report import size
    from slimtune.train.runs import folder_bytes

    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileError("the output folder is not empty" if target.is_dir() else "the output is a file", where=out, hint="choose a new folder")
    opened = reopen(run_dir, rows=False, quantize="none")  # a plain checkpoint holds plain weights
    if opened.adapter is None:
        shutil.copytree(opened.folder.model, target, dirs_exist_ok=True)
    else:
        write_merged(opened, target)
    kind = "AutoModelForSequenceClassification" if opened.job.task == "classification" else "AutoModelForCausalLM"
    print(f"{target}: {size(folder_bytes(target))}. Load it with {kind}.from_pretrained({str(target)!r})")
