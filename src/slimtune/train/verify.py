"""Does what was saved do what was trained? Run in a fresh process: load a run, answer, merge, answer again.

    python -m slimtune.train.verify RUN ANSWERS.json

Merging rounds each weight once more. In bfloat16 that, like any change of the order of sums, can turn an answer that was a toss-up; so
the rows whose answer leads by less than `TOSS_UP` are answered in float32 by all three models (live, reloaded, merged), where
rounding is a thousand times smaller than any lead, and all others in the model's own dtype. No row is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimtune.train.evaluate import Evaluation
from slimtune.train.runs import write_json

ROWS = 400
TOSS_UP = 0.3  # nats; about three times the largest shift that bfloat16 rounding was seen to make


def toss_ups(found: Evaluation, rows: int) -> list[int]:
    """The rows whose answer leads so little that bfloat16 could turn it."""
    return [i for i in range(rows) if found.margins[i] < TOSS_UP]


def exact_answers(job: Any, rows: Sequence[int]) -> list[int]:
    """The model's answers to some held-out rows in float32; the model stays in float32."""
    job.model.float()
    found: list[int] = job.evaluate([job.held_out()[i] for i in rows]).predictions if rows else []
    return found


def answers(run: Path, rows: Sequence[int], close: Sequence[int]) -> dict[str, list[int]]:
    """Answers of a saved run, reloaded and merged.

    Args:
        run: the run folder.
        rows: held-out rows to answer in the model's own dtype.
        close: held-out rows to answer in float32.
    """
    import slimtune as st
    from slimtune.train.reopen import reopen

    opened = reopen(run, rows=True)
    job = opened.job
    chosen = [job.held_out()[i] for i in rows]
    found = {"reloaded": job.evaluate(chosen, show="asking the reloaded adapter").predictions}
    st.merge(job.model, opened.adapter)
    found["merged"] = job.evaluate(chosen, show="asking the merged model").predictions
    st.unmerge(job.model)
    found["reloaded_exact"] = exact_answers(job, close)
    st.merge(job.model, opened.adapter)
    found["merged_exact"] = exact_answers(job, close)
    return found


if __name__ == "__main__":
    from slimtune.train.quiet import quiet
    from slimtune.train.runs import read_json

    asked = read_json(Path(sys.argv[2]))
    with quiet():
        write_json(Path(sys.argv[2]), answers(Path(sys.argv[1]), asked["rows"], asked["close"]))
