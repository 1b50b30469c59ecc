"""slimtune bench methods [--task NAME] [--only METHOD] [--out DIR] [--page DIR]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def run(tasks: Sequence[str], only: Sequence[str], out: Path, page: Path | None, parts: Sequence[str], steps: int | None, seeds: int) -> None:
    """Run the arena, or what is left of it, and write its page.

    Args:
        tasks: names of tasks; empty: all.
        only: names of contenders; empty: all.
        out: the folder of results.jsonl; what is in there is not measured again.
        page: where README.md and the pictures go; None: into `out`.
        parts: "scores", "costs" or both.
        steps: fewer steps for everybody, for a quick look.
        seeds: how many seeds, at most 3.

    Raises:
        RecipeError: a task or contender is unknown.
    """
    from slimtune.arena.contenders import SEEDS, contenders
    from slimtune.arena.page import write
    from slimtune.arena.run import Limits, default_store
    from slimtune.arena.run import run as measure
    from slimtune.arena.store import Store
    from slimtune.arena.tasks import TASKS, task_named
    from slimtune.core.errors import RecipeError, closest

    chosen = [task_named(name) for name in tasks] or list(TASKS)
    names = {c.name for t in chosen for c in contenders(t)}
    for name in only:
        if name not in names:
            raise RecipeError(f"nobody called {name!r} takes part", hint=f"closest: {closest(name, names)}")
    if not 1 <= seeds <= len(SEEDS):
        raise RecipeError(f"--seeds is 1 to {len(SEEDS)}, not {seeds}")
    store = Store(default_store(out))
    print(f"cells so far: {len(store.cells)} in {store.path}; stop with Ctrl-C and start again at any time", file=sys.stderr)
    try:
        measure(chosen, store, Limits(steps, tuple(only), seeds, tuple(parts)), lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is left ({len(store.cells)} cells are done)", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for path in write(store, page or out):
            print(path)
