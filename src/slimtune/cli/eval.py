"""slimtune eval RUN [--data FILE] [--limit N]"""

from __future__ import annotations


def run(run_dir: str, data: str | None, limit: int | None) -> None:
    """Measure a finished run on its held-out rows, or on other data, without and with what it learnt.

    Args:
        run_dir: the run folder.
        data: a file or data set to measure on instead.
        limit: at most this many rows.
    """
    from slimtune.train.data_notes import answers_text
    from slimtune.train.evaluate import Evaluation
    from slimtune.train.formats import MANY
    from slimtune.train.plain import plain
    from slimtune.train.reopen import bare, reopen
    from slimtune.train.report import number

    opened = reopen(run_dir, data=data, limit=limit, rows=True)
    rows = opened.job.held_out()
    after = opened.job.evaluate(rows, show="with the adapter" if opened.adapter else "measuring")
    before: Evaluation | None = None
    if opened.adapter:
        with bare(opened):
            before = opened.job.evaluate(rows, show="without it")

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{opened.folder.path.name}: {len(rows):,} examples", title_justify="left")
    table.add_column("")
    if before is not None:
        table.add_column("without", justify="right")
    table.add_column("with" if before is not None else "value", justify="right")
    for name, value in after.figures().items():
        table.add_row(name, *([number(before.figures()[name]) if name in before.figures() else ""] if before is not None else []), number(value))
    console = Console()
    console.print(table)
    for note in opened.job.bundle.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    said = answers_text(opened.job.bundle, opened.job.task)
    if said and after.confusion is None:
        console.print(said, markup=False, soft_wrap=True)
    if after.confusion is not None and len(after.labels) > MANY:
        wrong = sorted(
            ((n, r, c) for r, row in enumerate(after.confusion) for c, n in enumerate(row) if n and r != c), key=lambda found: -found[0]
        )
        for n, r, c in wrong[:10]:
            console.print(f"{plain(after.labels[r])} answered as {plain(after.labels[c])}: {n}", markup=False, soft_wrap=True)
    elif after.confusion is not None:
        grid = Table(title="right label (rows) and answer (columns)", title_justify="left")
        grid.add_column("")
        for label in after.labels:
            grid.add_column(escape(plain(label)), justify="right")
        for label, counts in zip(after.labels, after.confusion, strict=True):
            grid.add_row(escape(plain(label)), *map(str, counts))
        console.print(grid)
