"""From a recipe file and `key=value` overrides to a `Recipe`, or to one error that lists every problem with its line."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slimtune.core.errors import RecipeError, closest
from slimtune.core.reference_names import ELSEWHERE, known_as
from slimtune.train.method_options import check_options, methods_with, option_names, split_key
from slimtune.train.recipe import Recipe
from slimtune.train.sources import check_data_source, check_model_source
from slimtune.train.yaml_text import Entry, parse_flat, parse_override

# What people know these keys as from other tools; only ever used to word a hint. Those of methods: `core.reference_names`.
_ALIASES = {
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "epoch": "epochs", "steps": "max_steps",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size", "bs": "batch_size", "batch": "batch_size",
    "gradient_accumulation_steps": "accumulate", "grad_accum": "accumulate", "output_dir": "out", "output": "out",
    "model_name_or_path": "model", "base_model": "model", "dataset": "data", "train": "data", "cutoff_len": "max_length",
    "max_seq_length": "max_length", "lr_scheduler_type": "schedule", "scheduler": "schedule", "warmup_ratio": "warmup",
    "warmup_steps": "warmup", "max_grad_norm": "clip", "load_in_4bit": "quantize", "torch_dtype": "dtype", "adapter": "method",
    "peft_type": "method", "run_name": "name", "logging_steps": "log_every", "eval_steps": "eval_every",
    "save_steps": "save_every",
    "loraplus_lr_ratio": "up_ratio", "new_tokens": "add_tokens", "additional_special_tokens": "add_tokens", "tokens_to_add": "add_tokens",
}  # fmt: skip
_PATH_KEYS = ("train_file", "valid_file", "test_file")
_OWN_KEYS = [key for key in Recipe.model_fields if key != "options"]
_TEXT_KEYS = {key for key, field in Recipe.model_fields.items() if str(field.annotation) in ("<class 'str'>", "str | None")}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and validate a recipe.

    Args:
        path: the YAML file. Relative paths in it start from its folder; relative paths in overrides start from here (the cwd).
        overrides: `key=value` texts; the value is read as YAML. They win over the file.

    Raises:
        RecipeError: with `problems`, one text for each problem found.
    """
    path = Path(path)
    entries, problems = parse_flat(_read(path))
    if problems and not entries:  # what cannot be read at all is not missing its keys as well
        raise RecipeError(f"{path} cannot be read:", problems=problems, hint="`slimtune init` lists examples that work")
    for text in overrides:
        parsed = parse_override(text, _TEXT_KEYS)
        if isinstance(parsed, str):
            problems.append(parsed)
            continue
        entries[parsed[0]] = parsed[1]
    entries = {key: entry for key, entry in entries.items() if entry.value is not None}  # `key:` left empty means its default

    recipe = _build(path, entries, problems)
    if problems or recipe is None:
        count = f"{len(problems)} problems" if len(problems) != 1 else "a problem"
        raise RecipeError(f"{path} has {count}:", problems=sorted(problems, key=_line_order), hint="`slimtune init` lists examples that work")
    return recipe


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = closest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        hint = f"did you mean {near}?" if near else "`slimtune init` lists examples to start from"
        raise RecipeError("there is no such recipe", where=str(path), hint=hint) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe", where=str(path), hint="name the .yaml file inside it") from None
    except UnicodeDecodeError:
        raise RecipeError("this is not a text file in UTF-8", where=str(path), hint="a recipe is a short YAML file") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=str(path)) from None


def _build(path: Path, entries: dict[str, Entry], problems: list[str]) -> Recipe | None:
    values: dict[str, Any] = {}
    options: dict[str, Entry] = {}
    method = entries["method"].value if "method" in entries else "lora"
    known = option_names(method)  # None: no such method
    for key, entry in entries.items():
        if key in _OWN_KEYS:
            values[key] = entry.value
        elif known is not None and split_key(key) in known:
            options[split_key(key)] = entry
        elif users := methods_with(split_key(key)):
            if known is not None:
                fix = f"{key}= on the command line takes it out" if not entry.place.startswith("override") else "leave it out"
                problems.append(f"{entry.place}: `{key}` is an option of {', '.join(users)}; method {method} does not take it ({fix})")
        else:
            problems.append(f"{entry.place}: unknown key `{key}`; {_instead(key, known or [])}")
    base = path.resolve().parent

    def place(key: str) -> str:
        return entries[key].place if key in entries else "the recipe"

    def root(key: str) -> Path:
        return Path.cwd() if place(key).startswith("override") else base

    recipe, bad = None, set()
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            bad.add(key)
            problems.append(f"{place(key)}: {_in_words(key, item)}")
    if "method" not in bad:
        problems += check_options(method, options, place("method"))
    problems += [f"{place(key)}: {text}" for key, text in _cross_checks(values, bad)]

    resolved: dict[str, Any] = {}
    if "model" in values and "model" not in bad:
        resolved["model"], wrong = check_model_source(values["model"], root("model"))
        problems += [f"{place('model')}: {text}" for text in wrong]
    for key in ("data", *_PATH_KEYS):
        if key in values and key not in bad:
            resolved[key], wrong = check_data_source(values[key], root(key), only_file=key in _PATH_KEYS)
            problems += [f"{place(key)}: {key}: {text}" for text in wrong]
    if "data" not in values and "train_file" not in values:
        problems.append("the recipe: there is no `data` (nor `train_file`); for example `data: train.jsonl`")

    name = values.get("name") or re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "run"
    if "name" in values and "name" not in bad and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", values["name"]):
        problems.append(f"{place('name')}: name: use letters, digits, - and _ (it names a folder), got {values['name']!r}")
    out = root("out") / Path(str(values.get("out") or f"runs/{name}")).expanduser()
    if out.is_file():
        problems.append(f"{place('out')}: out: {out} is a file; the run needs a folder")
    if recipe is None:
        return None
    if recipe.lr is None:
        resolved["lr"] = 2e-5 if method == "full" else 5e-4
    return recipe.model_copy(update={**resolved, "name": name, "out": str(out), "options": {key: entry.value for key, entry in options.items()}})


def _instead(key: str, options: Sequence[str]) -> str:
    """Return what to write for a key that nobody here knows: its name in recipes, the method's option, or the closest."""
    right = _ALIASES.get(key) or known_as(key, options)
    if not right and key in ELSEWHERE and "st." not in ELSEWHERE[key]:
        return ELSEWHERE[key]
    return f"did you mean `{right or closest(key, [*_OWN_KEYS, *options], n=1)}`?"


def _cross_checks(values: dict[str, Any], bad: set[str]) -> list[tuple[str, str]]:
    """Problems of keys that are each fine alone."""
    found = []
    if "epochs" in values and "max_steps" in values:
        found.append(("max_steps", "max_steps: give either epochs or max_steps, not both"))
    if values.get("method") == "full" and values.get("quantize", "none") != "none":
        found.append(("quantize", "quantize: rounded weights cannot be trained; use an adapter, or quantize: none for method: full"))
    if values.get("add_tokens") and values.get("cache_trunk") is True:
        found.append(("cache_trunk", "cache_trunk: add_tokens trains rows below the first block, so there is no trunk to keep; leave one out"))
    warmup, steps = values.get("warmup"), values.get("max_steps")
    if isinstance(warmup, (int, float)) and warmup > 1 and warmup != int(warmup):
        found.append(("warmup", f"warmup: a fraction below 1, or a whole number of steps; got {warmup}"))
    elif isinstance(warmup, (int, float)) and isinstance(steps, int) and 1 <= steps <= warmup:
        found.append(("warmup", f"warmup: {int(warmup)} steps of warm-up leave none of the {steps} steps to train"))
    for key, field in (("prompt_template", "text"), ("completion_template", "label")):
        if key in values and key not in bad:
            problem = _template_problem(values[key], field)
            if problem:
                found.append((key, f"{key}: {problem}"))
    return found


def _template_problem(template: str, field: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"{error}; write {{{{ and }}}} for braces that are meant as text"
    if names == [field]:
        return ""
    return f"must contain {{{field}}} exactly once and no other braces, got {template!r}"


def _in_words(key: str, item: Any) -> str:
    """One pydantic error as a sentence a person can act on."""
    kind, context, got = item["type"], item.get("ctx", {}), item["input"]
    if kind == "missing":
        return f"there is no `{key}`; for example `{key}: HuggingFaceTB/SmolLM2-135M-Instruct`"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    if kind == "literal_error":
        options = context["expected"].replace("'", "").replace(" or ", ", ")
        near = closest(str(got), options.split(", "), n=1)
        return f"{key}: must be one of {options}; got {got!r}, did you mean `{near}`?"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        word = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
        (name, limit), *_ = context.items()
        return f"{key}: must be {word[name]} {limit:g}, got {got!r}"
    if kind == "finite_number":
        return f"{key}: must be a finite number, got {got!r}"
    if kind.startswith("int"):
        return f"{key}: expected a whole number, got {got!r}"
    if kind.startswith("float"):
        return f"{key}: expected a number, got {got!r}"
    if kind == "string_too_short":
        return f"{key}: must not be empty"
    if kind.startswith("string"):
        return f"{key}: expected text, got {got!r}"
    return f"{key}: {item['msg']}"


def _line_order(problem: str) -> tuple[int, int]:
    found = re.match(r"line (\d+)", problem)
    return (0, int(found[1])) if found else (1, 0)
