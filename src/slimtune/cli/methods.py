"""slimtune methods [NAME]"""

from __future__ import annotations

import dataclasses
import inspect


def run(name: str | None) -> None:
    """List the registered methods, or the options of one.

    Args:
        name: a method; None lists all.

    Raises:
        SpecError: no such method.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from slimtune.core.options import hints_of, written
    from slimtune.core.registry import methods, spec_class
    from slimtune.core.spec import Spec, default_of
    from slimtune.train.method_options import written_as

    console = Console(highlight=False)
    if name is None:
        if console.width < NARROW:
            for key, cls in methods().items():
                console.print(f"[bold]{key}[/] ({cls.port}): {escape(first_sentence(cls))}")
            console.print("\ntheir options: slimtune methods NAME", style="dim")
            return
        table = Table(box=None, pad_edge=False)
        for heading in ("method", "acts on", "what it is", "options"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "method")
        for key, cls in methods().items():
            own = [f.name for f in dataclasses.fields(cls) if f.name not in _COMMON]
            table.add_row(f"[bold]{key}[/]", cls.port, escape(first_sentence(cls)), ", ".join(own))
        console.print(table)
        console.print("\nall of them also take targets, layers, exclude and train_modules; more: slimtune methods NAME", style="dim")
        return
    cls = spec_class(name)
    console.print(inspect.getdoc(inspect.getmodule(cls)) or first_sentence(cls), markup=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "type", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    meanings, hints = argument_texts(cls), hints_of(cls)
    for field in dataclasses.fields(cls):
        default = default_of(field)
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) and default and isinstance(default[0], Spec) else default
        value = str(shown) if isinstance(default, Spec) or shown is not default else repr(default)
        cells = (written(hints[field.name]), value, meanings.get(field.name, ""))
        table.add_row(f"[bold]{written_as(field.name)}[/]", *map(escape, cells))
    console.print()
    console.print(table)


NARROW = 80  # columns below which the table would be one word wide
_COMMON = ("targets", "layers", "exclude", "train_modules")


def first_sentence(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n")[0]


def argument_texts(cls: type) -> dict[str, str]:
    """Return option -> meaning, from the Args sections of a class and its bases (one line for one or several options)."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        in_args = False
        names: list[str] = []
        for line in (owner.__doc__ or "").splitlines():
            text = line.strip()
            if text == "Args:":
                in_args = True
            elif in_args and (not text or (text.endswith(":") and " " not in text)):
                in_args, names = False, []
            elif in_args and ": " in text and all(part.strip().isidentifier() for part in text.split(": ")[0].split(",")):
                names = [part.strip() for part in text.split(": ")[0].split(",")]
                if ": see `" in text:  # the base class has said it already
                    names = []
                found |= dict.fromkeys(names, text.split(": ", 1)[1])
            elif in_args:
                found |= {name: f"{found[name]} {text}" for name in names}
    return found
