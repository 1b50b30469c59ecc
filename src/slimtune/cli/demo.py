"""slimtune demo [--model NAME] [--compare] [--out DIR]"""

from __future__ import annotations


def run(model: str | None, compare: bool, out: str) -> None:
    """Run the demonstration and print its figures.

    Args:
        model: another model; None for the packaged SmolLM2-135M-Instruct.
        compare: also measure full fine-tuning.
        out: the run folder.

    Raises:
        SystemExit: 1 when live, reloaded and merged model do not give the same answers; 130 after Ctrl-C.
    """
    from slimtune.train.demo import demo
    from slimtune.train.stopping import Stopped

    try:
        figures = demo(model, compare, out)
    except Stopped as stopped:
        print(f"{stopped}\nstart the demo again: it takes a few minutes", flush=True)
        raise SystemExit(130) from None
    if not figures["predictions_agree"]:
        raise SystemExit(1)
