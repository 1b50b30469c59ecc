"""slimtune generate RUN_OR_ADAPTER [--prompt TEXT ...] [--max-new-tokens N]"""

from __future__ import annotations

import sys


def run(run_dir: str, prompts: list[str], max_new_tokens: int, model: str | None = None) -> None:
    """Print what the adapted model writes after each prompt.

    Args:
        run_dir: the run folder, or an adapter's.
        prompts: texts; without any, the lines of standard input, or, at a terminal, three held-out examples.
        max_new_tokens: length of an answer, in tokens.
        model: the base of an adapter's folder; None: the one that it names.
    """
    from slimtune.cli.open_adapter import open_trained
    from slimtune.train.plain import plain_lines
    from slimtune.train.speak import speak

    if not prompts and not sys.stdin.isatty():
        prompts = [line for line in (raw.rstrip("\n") for raw in sys.stdin) if line.strip()]
    opened = open_trained(run_dir, model, rows=not prompts)
    opened.job.must_generate()
    ready = [opened.job.prompt_tokens(p) for p in prompts] or [opened.job.prompt_of(r) for r in opened.job.held_out()[:3]]
    for tokens in ready:
        if len(ready) > 1 or not prompts:
            print("> " + plain_lines(opened.job.text(tokens)).strip().replace("\n", "\n> "))
        print(plain_lines(speak(opened.job, tokens, max_new_tokens)).strip() + ("\n" if len(ready) > 1 else ""), flush=True)
