"""Held-out examples for the report: the prompt, what was expected, and the answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimtune.train.candidates import answer_of
from slimtune.train.evaluate import Evaluation
from slimtune.train.plain import plain_lines
from slimtune.train.problems import problem_of

if TYPE_CHECKING:
    from slimtune.train.job import Job

Row = dict[str, Any]
_SAMPLES = 3


def samples(job: Job, rows: Sequence[Row], before: Evaluation | None, after: Evaluation | None) -> list[dict[str, str]]:
    """Three held-out examples with both answers: one that training put right, one right both times, one still wrong.

    Free text is written out by the model as it is now and, where an adapter can be switched off, without it.

    Args:
        job: model, tokenizer and data.
        rows: the held-out rows that before and after were measured on.
        before, after: the figures with each row's answer.
    """
    return [{key: plain_lines(text) for key, text in sample.items()} for sample in _samples(job, rows, before, after)]


def _samples(job: Job, rows: Sequence[Row], before: Evaluation | None, after: Evaluation | None) -> list[dict[str, str]]:
    if after is not None and after.words:
        return [
            {
                "prompt": _shown(job, i, rows[i]),
                "expected": _expected(job, rows[i]),
                "before": before.words[i] if before else "",
                "after": after.words[i],
            }
            for i in range(min(_SAMPLES, len(rows)))
        ]
    if after is None or not after.labels:
        return _written(job, rows[:_SAMPLES])
    names, new = after.labels, after.predictions
    old = before.predictions if before is not None else new
    wanted = [_expected(job, r) for r in rows]
    outcomes = [(names[o] == w, names[n] == w) for o, n, w in zip(old, new, wanted, strict=True)]
    chosen: list[int] = []
    for kind in [(False, True), (True, True), (False, False), (True, False)]:
        chosen += [i for i, k in enumerate(outcomes) if k == kind][:1]
    for i in range(len(rows)):
        chosen += [i] if i not in chosen else []
    return [
        {"prompt": _shown(job, i, rows[i]), "expected": wanted[i], "before": names[old[i]] if before else "", "after": names[new[i]]}
        for i in chosen[:_SAMPLES]
    ]


def _written(job: Job, rows: Sequence[Row]) -> list[dict[str, str]]:
    import slimtune as st
    from slimtune.train.speak import speak

    found = []
    for row in rows:
        prompt, rest = job.prompt_of(row), row["input_ids"]
        expected = job.text(rest[len(prompt) :] if job.format == "text" else answer_of(row)).strip()
        room = min(64, len(rest) - len(prompt) + 8)
        before = ""
        if job.recipe.method != "full":
            with st.disabled(job.model):
                before = speak(job, prompt, room).strip()
        found.append({"prompt": job.text(prompt), "expected": expected, "before": before, "after": speak(job, prompt, room).strip()})
    return found


def _expected(job: Job, row: Row) -> str:
    if job.task == "classification":
        return problem_of(job.model).words(row["label"], job.labels)
    return job.text(answer_of(row)).strip()


def _shown(job: Job, i: int, row: Row) -> str:
    if job.format.startswith("text+"):  # as it was written, not as it was cut and put into a template
        return str(job.held_out_words()[i]["text"]).strip()
    return job.text(job.prompt_of(row)).strip()
