"""slimtune extract BASE TUNED OUT"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.core.errors import FileError, SpecError


def run(
    base: str, tuned: str, out: str, r: int | None, energy: float | None, targets: str, leave_rest: bool
) -> None:
    """Save what full fine-tuning has changed as an adapter.

    Args:
        base: the model that was fine-tuned, as in a recipe.
        tuned: the folder of the fine-tuned checkpoint (or a run that trained every weight).
        out: the new adapter's folder.
        r, energy, targets: of the LoRA; see `slimtune.extract`.
        leave_rest: leave out what else has changed.

    Raises:
        SlimtuneError: a model cannot be read, the two do not belong together, or the output folder is in use.
    """
    import slimtune as st
    from slimtune.cli.open_base import load, name_of
    from slimtune.cli.output import new_folder

    new_folder(out)
    if (r is None) == (energy is None):
        raise SpecError("a LoRA needs its rank: give either -r or --energy", hint="-r 16, or --energy 0.95 to have it found for every module")
    folder = Path(tuned)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    config = _config(folder)
    names = tuple(t.strip() for t in targets.split(",") if t.strip())
    where: str | tuple[str, ...] = names[0] if len(names) == 1 else names
    spec = st.LoRA(targets=where) if r is None else st.LoRA(r=r, targets=where)
    spec.validate()
    model = load(base, (config.architectures or [None])[0], {"num_labels": config.num_labels}, dtype=config.dtype or "auto")
    report = st.extract(model, folder, to=spec, energy=energy, name=name_of(out), rest="leave" if leave_rest else "dense")
    print(report)
    print(f"saved to {st.save(model, out, name=name_of(out))}")


def _config(folder: Path) -> Any:
    from slimtune.train.models import ResolvedModel, load_config

    if not (folder / "config.json").is_file():
        raise FileError(f"{folder} holds no config.json", where=str(folder.absolute()), hint="model.save_pretrained(folder) writes it")
    return load_config(ResolvedModel(str(folder), str(folder), "folder"))
