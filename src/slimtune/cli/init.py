"""slimtune init [NAME]"""

from __future__ import annotations

import json
from pathlib import Path

from slimtune.core.errors import FileError, RecipeError, closest
from slimtune.train.sources import ASSETS

RECIPES = ASSETS / "recipes"


def run(name: str | None, to: Path | None, schema: bool) -> None:
    """List the example recipes, or copy one, with the small data file that it needs.

    Args:
        name: an example's name; None lists them.
        to: the file to write; default NAME.yaml in the current folder.
        schema: print the JSON schema instead.

    Raises:
        RecipeError: no such example.
        FileError: the file is there already.
    """
    if schema:
        from slimtune.train.method_options import recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        return
    there = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    if name is None:
        width = max(map(len, there))
        for stem, path in there.items():
            print(f"{stem:<{width}}  {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        print("\ncopy one: slimtune init NAME")
        return
    if name not in there:
        raise RecipeError(f"there is no example called {name!r}", hint=f"closest: {closest(name, there, n=1)}; all: {', '.join(there)}")
    target = to or Path(f"{name}.yaml")
    pairs = [(there[name], target)]
    sample = RECIPES / f"{name}.jsonl"
    if sample.is_file():
        pairs.append((sample, target.parent / sample.name))
    taken = [str(path) for _, path in pairs if path.exists()]
    if taken:
        raise FileError("this file is there already; it is not overwritten", where=", ".join(taken), hint="slimtune init NAME --to OTHER.yaml")
    if not target.parent.is_dir():
        raise FileError("there is no such folder", where=str(target.parent))
    for source, path in pairs:
        path.write_bytes(source.read_bytes())
        print(f"wrote {path}")
    print(f"next: slimtune check {target}, then slimtune train {target}")
