"""Does what was saved do what was trained? Run in a fresh process: load a run, predict, merge, predict again.

    python -m slimtune.train.verify RUN ANSWERS.json

Loaded and live models run the same products, so their answers must be equal on every row. A merged weight is rounded once more,
which in bfloat16 moves an answer that was a toss-up; so the merged model is compared in float32, where rounding plays no part.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from slimtune.train.runs import write_json

EXACT_ROWS = 200  # float32 is several times slower than bfloat16 on a CPU that has it; this many rows take seconds


def exact_answers(job: Any) -> list[int]:
    """The model's answers in float32 on the first held-out rows; the model stays in float32."""
    job.model.float()
    found: list[int] = job.evaluate(job.held_out()[:EXACT_ROWS], show="comparing in float32").predictions
    return found


def answers(run: Path) -> dict[str, list[int]]:
    """Answers of a saved run: reloaded (all rows), and reloaded and merged in float32 (the first rows)."""
    import slimtune as st
    from slimtune.train.reopen import reopen

    opened = reopen(run, rows=True)
    job = opened.job
    found = {"reloaded": job.evaluate(job.held_out(), show="measuring the reloaded adapter").predictions}
    found["reloaded_exact"] = exact_answers(job)
    st.merge(job.model, opened.adapter)
    found["merged_exact"] = exact_answers(job)
    return found


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), answers(Path(sys.argv[1])))
