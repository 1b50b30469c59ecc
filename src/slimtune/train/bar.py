"""A progress bar for work that is counted in rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


class ProgressBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.bar: Any = None

    def __enter__(self) -> Callable[[int], None] | None:
        first = os.environ.get("RANK", "0") == "0"
        if not self.title or not sys.stderr.isatty() or not first:
            return None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn(self.title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task("", total=self.total)
        bar.start()
        self.bar = bar
        return lambda n: bar.advance(task, n)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
