"""One page a method, made from its docstrings, what it costs on a known model, and the arena; and the page that helps to choose.

    python -m slimtune.testing.method_pages --write docs/methods     # --arena docs/arena/results.jsonl is read if it is there
    python -m slimtune.testing.method_pages --check docs/methods
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import slimtune as st
from slimtune.cli.methods import argument_texts, first_sentence
from slimtune.core.errors import SlimtuneError
from slimtune.core.op import affine
from slimtune.core.options import hints_of, written
from slimtune.core.spec import Spec
from slimtune.testing.matrix import own_methods

CHOOSE = "Choose it when"
COMMON = ("targets", "layers", "exclude", "train_modules")

EXAMPLE = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slimtune as st

shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
model = LlamaForCausalLM(LlamaConfig(**shape))  # tiny and random; use any model of yours
ids = torch.arange(16).view(2, 8)

print(st.attach(model, {call}, name="mine"))  # everything else is frozen
optimiser = torch.optim.AdamW(st.param_groups(model, lr=1e-3))
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()

st.save(model, "out/mine", name="mine")
with st.disabled(model):
    print(model(input_ids=ids).logits.shape)  # the bare base
"""


def call(cls: type[Spec]) -> str:
    """Return the expression that makes a spec for the example, with the options that its own docstring says it needs."""
    return f"st.{cls.__name__}(total_steps=3)" if hasattr(cls, "scheduled") else f"st.{cls.__name__}()"


def facts(name: str) -> dict[str, Any]:
    """Return what a method costs on a model of SmolLM2-135M's shape, and whether it merges; or why it has no place there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape))  # type: ignore[arg-type]
    try:
        report = st.attach(model, st.methods()[name](), name="it")
    except SlimtuneError as error:
        return {"refused": error.what}
    ops = st.adapters(model)["it"].ops.values()
    return {"trainable": report.trainable, "percent": report.percent, "merges": all(affine(op) for op in ops), "ops": len(report.rows)}


def page(name: str, arena: dict[str, list[dict[str, Any]]]) -> str:
    """Return one method's page."""
    cls = st.methods()[name]
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    title, _, body = text.partition("\n")
    found = facts(name)
    lines = [f"# {cls.__name__} (`{name}`)", "", title, ""]
    lines += [re.sub(r"\n(?=(Papers?|Cost|Cannot|Works|Choose it when)\b)", "\n\n", body.strip()), ""]
    lines += ["## What it costs", ""]
    if "refused" in found:
        lines += [f"With its defaults it has no place in a plain Llama: {found['refused']}", ""]
    else:
        merges = "merges into the weights" if found["merges"] else "stays beside the weights (it does not merge)"
        lines += [
            f"On a model of SmolLM2-135M's shape, with its defaults: {found['trainable']:,} parameters ({found['percent']:.3f} %) in "
            f"{found['ops']} places; it {merges}.",
            "",
        ]
    lines += ["## Use it", "", "```python", EXAMPLE.format(call=call(cls)).rstrip(), "```", ""]
    recipe = ["model: HuggingFaceTB/SmolLM2-135M-Instruct", "data: reviews.jsonl", f"method: {name}"]
    lines += ["In a recipe for `slimtune train`:", "", "```yaml", *recipe, "```", ""]
    lines += ["## Options", "", "| option | type | default | meaning |", "|---|---|---|---|"]
    meanings, hints = argument_texts(cls), hints_of(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name in COMMON):
        default = repr(f.default) if f.default is not dataclasses.MISSING else repr(f.default_factory()) if callable(f.default_factory) else ""
        cells = (f"`{f.name}`", f"`{written(hints[f.name])}`", f"`{default}`", meanings.get(f.name, ""))
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    results = [(task, r) for task, rows in arena.items() for r in rows if r["name"] == name and r["refused"] is None]
    if results:
        lines += ["", "## In the arena", "", "| task | who | score | spread | s / step |", "|---|---|---|---|---|"]
        lines += [
            f"| {task} | {r['who']} | {r['score']:.3f} | {r['spread']:.3f} | {'' if r['seconds'] is None else format(r['seconds'], '.3f')} |"
            for task, r in results
        ]
        lines += ["", "Everybody beside it: [the arena](../arena/README.md)."]
    lines += ["", "Where it goes: [kinds of module](../support-matrix.md), [architectures](../architectures.md). [All methods](README.md).", ""]
    return "\n".join(lines)


def choose_when(name: str) -> str:
    """Return the sentence of a method's module docstring that says when to choose it, without its first words."""
    text = " ".join((inspect.getdoc(inspect.getmodule(st.methods()[name])) or "").split())
    start = text.find(CHOOSE)
    return text[start + len(CHOOSE) :].split(". ")[0].strip().rstrip(".") if start >= 0 else ""


def index(names: list[str]) -> str:
    """Return the overview of all methods."""
    lines = [
        "# Methods",
        "",
        "Not sure? [Which method?](choosing.md) starts from what you have. Parameters: with a method's defaults on a model of the shape of",
        "SmolLM2-135M.",
        "",
        "| method | what it is | parameters | merges | choose it when |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        found = facts(name)
        number = "-" if "refused" in found else f"{found['trainable']:,}"
        merges = "-" if "refused" in found else "yes" if found["merges"] else "no"
        what = first_sentence(st.methods()[name]).replace("|", "\\|")
        lines.append(f"| [{name}]({name}.md) | {what} | {number} | {merges} | {choose_when(name)} |")
    return "\n".join([*lines, ""])


def pages(arena_file: Path | None) -> dict[str, str]:
    """Return file name -> text of every generated page."""
    arena: dict[str, list[dict[str, Any]]] = {}
    if arena_file is not None and arena_file.is_file():
        from slimtune.arena.run import results
        from slimtune.arena.store import Store
        from slimtune.arena.tasks import TASKS

        store = Store(arena_file)
        arena = {task.title: results(task, store) for task in TASKS}
    names = own_methods()
    return {"README.md": index(names)} | {f"{name}.md": page(name, arena) for name in names}


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m slimtune.testing.method_pages", description="Write or check the pages of the methods.")
    parser.add_argument("--write", metavar="DIR", type=Path)
    parser.add_argument("--check", metavar="DIR", type=Path)
    parser.add_argument("--arena", metavar="FILE", type=Path, default=Path("docs/arena/results.jsonl"))
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    folder = options.write or options.check
    if folder is None:
        parser.error("give --write DIR or --check DIR")
    fresh = pages(options.arena)
    if options.write is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in fresh.items():
            (folder / name).write_text(text, encoding="utf-8")
        print(f"{len(fresh)} pages in {folder}")
        return 0
    stale = [n for n, text in fresh.items() if not (folder / n).is_file() or (folder / n).read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"{folder / name} is out of date: python -m slimtune.testing.method_pages --write {folder}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
