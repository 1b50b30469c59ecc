"""slimtune convert ADAPTER --out DIR"""

from __future__ import annotations

from slimtune.core.errors import SpecError


def run(adapter: str, out: str, r: int | None, energy: float | None, model: str | None) -> None:
    """Save an adapter as a LoRA.

    Args:
        adapter: its folder, or that of its run.
        out: the new adapter's folder.
        r, energy: of the LoRA; see `slimtune.convert`.
        model: the base; None: the one that the adapter names.

    Raises:
        SlimtuneError: it cannot be read or converted, or the output folder is in use.
    """
    import slimtune as st
    from slimtune.cli.open_base import adapter_folder, name_of, open_base
    from slimtune.cli.output import new_folder

    new_folder(out)
    if (r is None) == (energy is None):
        raise SpecError("a LoRA needs its rank: give either -r or --energy", hint="-r 8, or --energy 0.95 to have it found for every module")
    folder = adapter_folder(adapter)
    base = open_base(adapter, model)
    old, new = name_of(adapter), name_of(out)
    new = new if new != old else f"{new}_new"
    st.load(base, folder, name=old)
    print(st.convert(base, old, to=st.LoRA() if r is None else st.LoRA(r=r), energy=energy, name=new))
    print(f"saved to {st.save(base, out, name=new)}")
