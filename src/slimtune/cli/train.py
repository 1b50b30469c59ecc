"""slimtune train RECIPE.yaml [key=value ...] [--resume]"""

from __future__ import annotations

import shlex


def run(recipe_path: str, overrides: list[str], resume: bool) -> None:
    """Train as a recipe says, show the figures, and say where everything is.

    Args:
        recipe_path: the recipe file.
        overrides: `key=value` settings that win over the file.
        resume: continue an interrupted run.

    Raises:
        SystemExit: 130 after Ctrl-C; the run is saved.
    """
    from slimtune.train.load_recipe import load_recipe
    from slimtune.train.needs import check_packages

    recipe = load_recipe(recipe_path, overrides)
    check_packages(recipe)

    from slimtune.train.engine import train
    from slimtune.train.outcome import lines
    from slimtune.train.stopping import Stopped

    go_on = f"go on with: slimtune train {shlex.join([recipe_path, *overrides])} --resume"
    try:
        result = train(recipe, resume=resume)
    except Stopped as stopped:
        print(f"{stopped}\n{go_on}", flush=True)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print(f"\nstopped at once; if a checkpoint was written before, {go_on}", flush=True)
        raise SystemExit(130) from None
    if result.main:
        print("\n".join(lines(result)), flush=True)
