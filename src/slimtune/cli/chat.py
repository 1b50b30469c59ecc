"""slimtune chat RUN_OR_ADAPTER"""

from __future__ import annotations

LONGEST = 256  # tokens of an answer


def run(run_dir: str, model: str | None = None) -> None:
    """Talk with the adapted model until an empty line or Ctrl-D.

    Args:
        run_dir: the run folder, or an adapter's.
        model: the base of an adapter's folder; None: the one that it names.
    """
    from slimtune.cli.open_adapter import open_trained
    from slimtune.train.plain import plain_lines
    from slimtune.train.speak import speak

    opened = open_trained(run_dir, model)
    opened.job.must_generate()
    job, turns = opened.job, list[dict[str, str]]()
    print("an empty line or Ctrl-D ends the talk" + ("" if job.chats else "; this model was trained without turns, so it sees each line alone"))
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        turns = [*turns, {"role": "user", "content": line}] if job.chats else []
        tokens = job.turn_tokens(turns) if job.chats else job.prompt_tokens(line)
        print("model> ", end="", flush=True)
        answer = speak(job, tokens, LONGEST, show=lambda piece: print(plain_lines(piece), end="", flush=True))
        print()
        turns = [*turns, {"role": "assistant", "content": answer}]
