"""slimtune combine ADAPTER=WEIGHT ... --out DIR"""

from __future__ import annotations

from pathlib import Path

from slimtune.core.errors import MismatchError, SpecError


def run(
    adapters: list[str], out: str, how: str, density: float | None, r: int | None, energy: float | None, dense: bool, model: str | None
) -> None:
    """Combine adapters on the disk and save the result.

    Args:
        adapters: folders, each with "=" and its weight, or without for 1.
        out: the new adapter's folder.
        how, density, r, energy, dense: see `slimtune.combine`.
        model: the base; None: the one that the first adapter names.

    Raises:
        SlimtuneError: an adapter cannot be read or combined, or the output folder is in use.
    """
    import slimtune as st
    from slimtune.cli.open_base import adapter_folder, name_of, open_base
    from slimtune.cli.output import new_folder

    new_folder(out)
    weights: dict[str, float] = {}
    folders: dict[str, Path] = {}
    for folder, w in map(parse, adapters):
        name = name_of(folder)
        name = name if name not in weights else f"{name}_{len(weights) + 1}"
        folders[name], weights[name] = adapter_folder(folder), w
    base = open_base(parse(adapters[0])[0], model)
    for name, path in folders.items():
        try:
            st.load(base, path, name=name)
        except MismatchError as error:
            heads = [_head(first), _head(path)] if (first := next(iter(folders.values()))) != path else []
            if not all(heads) or heads[0] == heads[1]:
                raise
            what = f"these adapters are of models with another kind of head: {heads[0]} and {heads[1]}"
            hint = "combine adapters of one kind of model; train one of them again on the other's"
            raise MismatchError(what, where=f"{first}, {path}", hint=hint) from error
    new = name_of(out) if name_of(out) not in weights else f"{name_of(out)}_new"
    print(st.combine(base, weights, name=new, how=how, density=density, r=r, energy=energy, dense=dense))
    print(f"saved to {st.save(base, out, name=new)}")


def _head(folder: Path) -> str:
    """Return the task that an adapter's config names, or ""."""
    from slimtune.files.adapter import read

    return str((read(folder, frozenset())[2] or {}).get("task_type") or "")


def parse(text: str) -> tuple[str, float]:
    """Return (folder, weight) of what was typed.

    Raises:
        SpecError: the weight is no number.
    """
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise SpecError(f"{weight!r} is no weight", where=text, hint="ADAPTER=0.5") from None
