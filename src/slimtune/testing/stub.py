"""`slimtune/__init__.pyi`: what editors and type checkers see of `import slimtune as st`, made from its list of names and the registry.

    python -m slimtune.testing.stub            # says whether the file is up to date
    python -m slimtune.testing.stub --write

Every method is a class with all its options and what may be written for them, so that completion shows both.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import slimtune
from slimtune.cli.methods import first_sentence
from slimtune.core.options import hints_of, written
from slimtune.core.spec import Spec
from slimtune.testing.matrix import own_methods

FILE = Path(slimtune.__file__).with_suffix(".pyi")
HEAD = '''"""Names of slimtune. Made by `python -m slimtune.testing.stub --write`; do not edit."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

'''


def stub() -> str:
    """Return the text of the file."""
    classes = [slimtune.methods()[name] for name in own_methods()]
    homes = {home: [f"{name} as {name}" for name in names] for home, names in vars(slimtune)["_HOME"].items()}
    for cls in classes:
        homes.setdefault(cls.__module__, []).append(f"{cls.__name__} as _{cls.__name__}")
    homes["slimtune.version"] = ["__version__ as __version__"]
    lines = [line for home, names in sorted(homes.items()) for line in _import(home, sorted(names))]
    text = HEAD + "\n".join(lines) + "\n" + "".join(_class(cls) for cls in sorted(classes, key=lambda cls: cls.__name__))
    unused = [word for word in ("Mapping", "Literal", "Any", "Path", "Iterable") if text.count(word) == 1]
    return "".join(line + "\n" for line in _without(text, unused).splitlines())


def _import(home: str, names: list[str]) -> list[str]:
    return [f"from {home} import {name}" for name in names]


def _class(cls: type[Spec]) -> str:
    hints = hints_of(cls)
    options = [f"        {f.name}: {written(hints[f.name], taken=True)} = {_default(f)}," for f in dataclasses.fields(cls)]
    sentence = first_sentence(cls).replace("\\", "\\\\")
    body = "\n".join(["        self,", "        *,", *options])
    return f'\nclass {cls.__name__}(_{cls.__name__}):\n    """{sentence}"""\n\n    def __init__(\n{body}\n    ) -> None: ...\n'


def _default(field: dataclasses.Field[Any]) -> str:
    """Return a default as a stub may say it: numbers, words and None themselves, anything else as "..."."""
    plain = field.default is None or isinstance(field.default, (bool, int, float, str))
    return repr(field.default).replace("'", '"') if plain else "..."


def _without(text: str, names: list[str]) -> str:
    lines = []
    for line in text.splitlines():
        if line.startswith(("from collections.abc", "from pathlib", "from typing")):
            home, _, imported = line.partition(" import ")
            left = [name for name in imported.split(", ") if name not in names]
            line = f"{home} import {', '.join(left)}" if left else ""
            if not left:
                continue
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Write the file, or say whether it is up to date."""
    if "--write" in sys.argv[1:]:
        FILE.write_text(stub(), encoding="utf-8")
        return 0
    same = FILE.is_file() and FILE.read_text(encoding="utf-8") == stub()
    print("up to date" if same else f"{FILE} is not up to date: python -m slimtune.testing.stub --write")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
