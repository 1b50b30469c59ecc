"""The packages that a recipe will need, asked for before the work: not after an hour of training, when the report is drawn."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from slimtune.core.errors import RecipeError

if TYPE_CHECKING:
    from slimtune.train.recipe import Recipe

TRAIN = {
    "transformers": "models", "accelerate": "the Trainer", "datasets": "tables of rows", "matplotlib": "the report's figures",
    "jinja2": "the report", "sklearn": "figures of classifiers",
}  # fmt: skip
EXTRA_OF = {"bitsandbytes": "quant"}
NAMES = {"sklearn": "scikit-learn"}  # where a package is installed under another name


def packages(recipe: Recipe) -> dict[str, str]:
    """Return module name -> what it is for, of everything that a run of this recipe imports."""
    needed = dict(TRAIN)
    if recipe.quantize in {"nf4", "int8"}:
        needed["bitsandbytes"] = f"quantize: {recipe.quantize}"
    if ".gguf" in recipe.model:
        needed["gguf"] = "reading a .gguf file"
    return needed


def check_packages(recipe: Recipe) -> None:
    """Raise unless everything that the recipe needs is installed.

    Raises:
        RecipeError: naming every package that is missing, what it is for, and the command that installs them.
    """
    missing = {name: why for name, why in packages(recipe).items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(dict.fromkeys(EXTRA_OF.get(name, "train") for name in missing))
        raise RecipeError(
            "this recipe needs packages that are not installed:",
            problems=[f"{NAMES.get(name, name)}, for {why}" for name, why in missing.items()],
            hint=f"pip install 'slimtune[{extras}]'",
        )
