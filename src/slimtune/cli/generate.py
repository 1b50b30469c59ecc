"""slimtune generate RUN [--prompt TEXT ...] [--max-new-tokens N]"""

from __future__ import annotations

import sys


def run(run_dir: str, prompts: list[str], max_new_tokens: int) -> None:
    """Print what the adapted model writes after each prompt.

    Args:
        run_dir: the run folder.
        prompts: texts; without any, the lines of standard input, or, at a terminal, three held-out examples.
        max_new_tokens: length of an answer, in tokens.
    """
    from slimtune.train.reopen import reopen
    from slimtune.train.speak import speak

    if not prompts and not sys.stdin.isatty():
        prompts = [line for line in (raw.rstrip("\n") for raw in sys.stdin) if line.strip()]
    opened = reopen(run_dir, rows=not prompts)
    opened.job.must_generate()
    ready = [opened.job.prompt_tokens(p) for p in prompts] or [opened.job.prompt_of(r) for r in opened.job.held_out()[:3]]
    for tokens in ready:
        if len(ready) > 1 or not prompts:
            print("> " + opened.job.text(tokens).strip().replace("\n", "\n> "))
        print(speak(opened.job, tokens, max_new_tokens).strip() + ("\n" if len(ready) > 1 else ""), flush=True)
