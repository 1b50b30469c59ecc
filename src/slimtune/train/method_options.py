"""The method's own keys of a recipe, read from the registry: a new method's options work in recipes with no change here.

An option is written under its own name (`r: 8`). Where a method's option has the name of one of the recipe's own keys,
it is written with the prefix `method_` (`method_seed: 3`), which is allowed for every option.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import SpecError, closest
from slimtune.train.yaml_text import Entry

if TYPE_CHECKING:
    from slimtune.core.spec import Spec
    from slimtune.methods.trainable_tokens import TrainableTokens
    from slimtune.train.recipe import Recipe

FULL = "full"  # full fine-tuning of every weight: not a method, but what methods are compared with
_PREFIX = "method_"
_JSON_TYPES: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Path: "string"}


def split_key(key: str) -> str:
    """Return the option that a flat recipe key names."""
    return key.removeprefix(_PREFIX)


def written_as(option: str) -> str:
    """Return the flat recipe key that names an option."""
    from slimtune.train.recipe import Recipe

    return _PREFIX + option if option in Recipe.model_fields else option


def option_names(method: Any) -> list[str] | None:
    """Return the options a method takes, or None if there is no such method."""
    from slimtune.core.registry import methods

    if method == FULL:
        return []
    found = methods().get(method) if isinstance(method, str) else None
    return None if found is None else [f.name for f in dataclasses.fields(found)]


def methods_with(option: str) -> list[str]:
    """Return the methods that take an option."""
    from slimtune.core.registry import methods

    return [name for name, cls in methods().items() if any(f.name == option for f in dataclasses.fields(cls))]


def check_options(method: str, options: dict[str, Entry], place: str) -> list[str]:
    """Return every problem of the method's name and options, each with its place in the recipe."""
    from slimtune.core.options import hints_of, problem, read
    from slimtune.core.registry import methods, spec_class
    from slimtune.core.spec import Spec

    if method == FULL:
        return []
    if method not in methods():
        names = [*methods(), FULL]
        return [f"{place}: method: there is no {method!r}; did you mean `{closest(method, names, n=1)}`? Known: {', '.join(names)}"]
    hints = hints_of(spec_class(method))
    problems = []
    for name, (value, where) in options.items():
        try:
            if text := problem(name, read(value, hints[name]), hints[name]):
                problems.append(f"{where}: {text}")
        except SpecError as error:  # in a spec inside this option: the members of a union
            problems.append(f"{where}: {name}: {error.where}: {error.what}")
    if not problems:
        try:
            Spec.from_dict({"method": method, **{name: entry.value for name, entry in options.items()}})
        except SpecError as error:
            for text in error.what.split("; "):
                name = text.split(" ")[0].rstrip(":=")
                problems.append(f"{options[name].place if name in options else place}: {text}")
    return problems


def build_spec(recipe: Recipe, task: str, new: TrainableTokens | None = None) -> Spec | None:
    """Return the spec a recipe asks for, or None for full fine-tuning.

    What `train_modules` means where the recipe does not name it is decided when the spec is attached (see `core.task_head`).

    Args:
        recipe: a validated recipe.
        task: "causal_lm" or "classification" (already decided, not "auto").
        new: what trains the rows of its new tokens, from `new_tokens.extend`.
    """
    from slimtune.core.spec import Spec
    from slimtune.train.new_tokens import beside

    if recipe.method == FULL:
        return None
    spec = Spec.from_dict({"method": recipe.method, **recipe.options})
    return spec if new is None else beside(spec, new)


def schema_of_options() -> dict[str, Any]:
    """Return JSON-schema properties for every option of every registered method (for editors)."""
    from slimtune.core.options import hints_of
    from slimtune.core.registry import methods

    users: dict[str, list[str]] = {}
    kinds: dict[str, set[str]] = {}
    for name, cls in methods().items():
        for option, hint in hints_of(cls).items():
            key = written_as(option)
            users.setdefault(key, []).append(name)
            kinds.setdefault(key, set()).update(_json_types(hint))
    return {key: {"type": sorted(kinds[key]), "description": f"option of {', '.join(users[key])}"} for key in users}


def _json_types(hint: Any) -> set[str]:
    """Return the JSON types in which a value of this type may be written."""
    from slimtune.core.options import choices, is_spec

    found: set[str] = set()
    for kind in choices(hint):
        if is_spec(kind):
            found |= {"object", "string"}
        elif kind in _JSON_TYPES:
            found.add(_JSON_TYPES[kind])
        else:
            found.add("object" if kind is dict else "array")
    return found


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for completion and checking in editors."""
    from slimtune.train.recipe import Recipe

    schema = Recipe.model_json_schema()
    del schema["properties"]["options"]
    for field in schema["properties"].values():
        field.pop("section", None)
    schema["properties"] |= schema_of_options()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "slimtune recipe"}
