"""The `slimtune` command. Each sub-command imports what it needs when it runs, so that `--help` answers at once.

A user's mistake ends in a message, a hint and exit code 2; Ctrl-C in 130; only a defect of slimtune shows a traceback
(SLIMTUNE_TRACEBACK=1 shows it always).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.core.errors import RecipeError, SlimtuneError
from slimtune.core.visible import visible
from slimtune.version import __version__

if TYPE_CHECKING:
    from rich.text import Text

app = typer.Typer(
    name="slimtune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: [bold]slimtune init reviews[/bold], then [bold]slimtune train reviews.yaml[/bold]",
)

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.", show_default=False)]
OverridesArg = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file.", show_default=False)]
RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]

TrainedArg = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a finished run, or an adapter's.", show_default=False)
]
ModelOption = Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter names.", show_default=False)]


def _example(*lines: str) -> str:
    return "\n\n".join(["Example:", *(f"[bold]{line}[/bold]" for line in lines)])


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Adapt large frozen models by training a sliver of their parameters."""
    if version:
        print(f"slimtune {__version__}")
        raise typer.Exit


@app.command(epilog=_example("slimtune init", "slimtune init reviews"))
def init(
    name: Annotated[str | None, typer.Argument(help="An example; without it, they are listed.", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option(help="The file to write; default: NAME.yaml here.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """List the example recipes, or copy one here to start from."""
    _run("init", name, to, schema)


@app.command(epilog=_example("slimtune check reviews.yaml", "slimtune check reviews.yaml r=16 lr=1e-3"))
def check(recipe: RecipeArg, overrides: OverridesArg = None) -> None:
    """Check a recipe, and show what it will train, for how long, and what it will write; nothing is written."""
    _run("check", recipe, overrides or [])


@app.command(epilog=_example("slimtune train reviews.yaml", "slimtune train reviews.yaml lr=1e-3 epochs=1", "slimtune train reviews.yaml --resume"))
def train(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run was stopped.")] = False,
) -> None:
    """Train as a recipe says."""
    _run("train", str(recipe), overrides or [], resume)


@app.command(name="eval", epilog=_example("slimtune eval runs/reviews", "slimtune eval runs/reviews --data new.jsonl --limit 200"))
def eval_(
    run: RunArg,
    data: Annotated[str | None, typer.Option(help="Measure on these data instead.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="On at most this many rows.")] = None,
) -> None:
    """Measure a run on held-out rows, with and without what it learnt."""
    _run("eval", str(run), data, limit)


@app.command(epilog=_example("slimtune generate runs/reviews --prompt 'Tasty, and cheap.'", "slimtune generate runs/reviews < prompts.txt"))
def generate(
    run: TrainedArg,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to answer; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer, in tokens.")] = 128,
    model: ModelOption = None,
) -> None:
    """Show what the adapted model writes after a prompt."""
    _run("generate", str(run), prompt or [], max_new_tokens, model)


@app.command(epilog=_example("slimtune chat runs/assistant"))
def chat(run: TrainedArg, model: ModelOption = None) -> None:
    """Talk with the adapted model."""
    _run("chat", str(run), model)


@app.command(epilog=_example("slimtune merge runs/reviews --out merged"))
def merge(
    run: TrainedArg,
    out: Annotated[str, typer.Option(metavar="DIR", help="A new folder for the merged model.", show_default=False)],
    model: ModelOption = None,
) -> None:
    """Fold the adapter into the model and write a plain transformers checkpoint."""
    _run("merge", str(run), out, model)


@app.command(
    epilog=_example(
        "slimtune combine out/a=0.5 out/b=0.5 --out out/both",
        "slimtune combine out/a out/b --how ties --density 0.3 -r 16 --out out/merged",
        "slimtune combine out/all=1 out/rude=-1 --out out/polite",
    )
)
def combine(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER=WEIGHT", help="Adapters with their weights; 1 where none is given.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder of the new adapter.", show_default=False)],
    how: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, or one of these with _svd.")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of entries that stay, where how prunes.")] = None,
    r: Annotated[int | None, typer.Option("-r", "--r", help="Largest rank, where how has one.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead of -r: the share of the squared norm to keep.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Keep the exact result, as large as the weights.")] = False,
    model: ModelOption = None,
) -> None:
    """Make one adapter out of several: sums, differences, TIES, DARE."""
    _run("combine", adapters, out, how, density, r, energy, dense, model)


@app.command(epilog=_example("slimtune convert out/ia3 -r 8 --out out/as_lora", "slimtune convert runs/reviews --energy 0.95 --out out/small"))
def convert(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or that of its run.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder of the new adapter.", show_default=False)],
    r: Annotated[int | None, typer.Option("-r", "--r", help="Its rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead of -r: the share of the squared norm to keep.")] = None,
    model: ModelOption = None,
) -> None:
    """Turn an adapter of any method that merges into a LoRA, or a LoRA into one of lower rank."""
    _run("convert", adapter, out, r, energy, model)


@app.command(epilog=_example("slimtune extract HuggingFaceTB/SmolLM2-135M full out/lora -r 16", "slimtune extract base tuned out/lora --energy 0.9"))
def extract(
    base: Annotated[str, typer.Argument(help="The model that was fine-tuned: as in a recipe.", show_default=False)],
    tuned: Annotated[str, typer.Argument(help="The folder of the fine-tuned checkpoint.", show_default=False)],
    out: Annotated[str, typer.Argument(help="The folder of the new adapter.", show_default=False)],
    r: Annotated[int | None, typer.Option("-r", "--r", help="Its rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead of -r: the share of the squared norm to keep.")] = None,
    targets: Annotated[str, typer.Option(help="Where it goes, names with commas between.")] = "all-linear",
    leave_rest: Annotated[bool, typer.Option("--leave-rest", help="Leave out what else has changed: norms, embeddings, heads.")] = False,
) -> None:
    """Make an adapter of what full fine-tuning has changed."""
    _run("extract", base, tuned, out, r, energy, targets, leave_rest)


@app.command(epilog=_example("slimtune inspect data reviews.yaml", "slimtune inspect runs/reviews/adapter"))
def inspect(
    what: Annotated[str, typer.Argument(metavar="data RECIPE | ADAPTER", help="The word data and a recipe; or an adapter's folder.")],
    rest: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that win over the recipe.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many examples to show.")] = 3,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
) -> None:
    """Show examples token by token with their loss mask, or what is in an adapter."""
    if what == "data":
        _run("inspect", "data", rest or [], rows, split)
    else:
        _run("inspect", "adapter", [what, *(rest or [])], rows, split)


@app.command(epilog=_example("slimtune methods", "slimtune methods lora"))
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see its options.", show_default=False)] = None,
) -> None:
    """List the methods that are there, and what each can do."""
    _run("methods", name)


@app.command(epilog=_example("slimtune demo", "slimtune demo --compare"))
def demo(
    model: Annotated[str | None, typer.Option(help="Another model than the packaged SmolLM2-135M-Instruct.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Measure full fine-tuning beside it.")] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="The run's folder.")] = "runs/demo",
) -> None:
    """Teach a small model to judge reviews, in minutes, and show what came of it."""
    _run("demo", model, compare, out)


bench = typer.Typer(no_args_is_help=True, help="Compare methods on small tasks with real models.")
app.add_typer(bench, name="bench")


@bench.command(name="methods", epilog=_example("slimtune bench methods", "slimtune bench methods --task minilm-reviews --only lora --only ia3"))
def bench_methods(
    task: Annotated[list[str] | None, typer.Option(help="minilm-reviews, smollm2-reviews or smollm2-phonemes; default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these contenders.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results.jsonl is kept; what it holds is not measured again.")] = Path("runs/arena"),
    page: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the page and the pictures go; default: beside the results.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="scores, costs or both (default). Take costs on an idle machine.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps for everybody: a quick look, no result.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
) -> None:
    """Let every method learn the same tasks, beside all weights, a head alone, TF-IDF and the reference library (about three hours)."""
    _run("bench", task or [], only or [], out, page, part or ["scores", "costs"], steps, seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: as in a shell, without the program's name; sys.argv[1:] if None.
    """
    # Words of the libraries below about things the user neither did nor can change; each can be set to see them again.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it tells of an optional kernel that is not installed
    try:
        app(args=None if arguments is None else list(arguments), prog_name="slimtune")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _run(command: str, *values: Any) -> None:
    """Import a command's module, call its `run`, and turn mistakes into messages."""
    try:
        code = importlib.import_module(f"slimtune.cli.{command}").run(*values)
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has gone: that is not an error, and flushing would complain
        raise typer.Exit(0) from None
    except SlimtuneError as error:
        if os.environ.get("SLIMTUNE_TRACEBACK"):
            raise
        _show(error)
        raise typer.Exit(2) from None
    except OSError as error:  # the disk, the rights, the names: never a defect of the program
        if os.environ.get("SLIMTUNE_TRACEBACK"):
            raise
        _show(SlimtuneError(f"{error.strerror or error}", where=str(error.filename or "")))
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        if os.environ.get("SLIMTUNE_TRACEBACK") or (error.name or "").startswith("slimtune"):
            raise
        _show(SlimtuneError(f"this command needs the package {error.name}", hint="pip install 'slimtune[train]'"))
        raise typer.Exit(2) from None
    if isinstance(code, int) and code:
        raise typer.Exit(code)


def _show(error: SlimtuneError) -> None:
    """Print an error: what happened, every problem, where, and in colour what to do about it."""
    from rich.text import Text

    problems = error.problems if isinstance(error, RecipeError) else []
    lines = [Text.assemble(("error: ", "bold red"), (visible(error.what), "bold")), *(Text(f"  - {visible(problem)}") for problem in problems)]
    lines += [Text(f"  where: {visible(error.where)}")] if error.where else []
    lines += [Text(f"  hint:  {visible(error.hint)}", style="cyan")] if error.hint else []
    _say(*lines)


def _say(*lines: Text | str) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for line in lines:
        console.print(line)


if __name__ == "__main__":
    sys.exit(main())
