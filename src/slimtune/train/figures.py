"""The pictures of a run: curves while training, accuracy before and after. Each is drawn for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.core.errors import SpecError

FIGURES = ("loss", "accuracy", "learning_rate", "speed", "confusion", "ranks")


@dataclass(frozen=True)
class Palette:
    """Colours of one page theme (hex)."""

    ink: str
    faint: str
    grid: str
    first: str
    second: str
    muted: str


LIGHT = Palette(ink="#1f2430", faint="#6b7280", grid="#e5e7eb", first="#2563eb", second="#d97706", muted="#cbd5e1")
DARK = Palette(ink="#e5e7eb", faint="#9aa3b2", grid="#2b3242", first="#7aa7ff", second="#f5b454", muted="#475066")


@dataclass(frozen=True)
class Figure:
    """One picture in both themes."""

    name: str
    caption: str
    light: Path
    dark: Path


def smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average without the bias towards the first value.

    Args:
        values: the series.
        weight: memory in [0, 1); 0 gives the series back.
    """
    out: list[float] = []
    total, norm = 0.0, 0.0
    for v in values:
        total, norm = weight * total + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def draw_figures(metrics: Sequence[Mapping[str, Any]], results: Mapping[str, Any], folder: Path) -> list[Figure]:
    """Draw every picture the run has figures for.

    Args:
        metrics: rows of metrics.jsonl.
        results: results.json.
        folder: where the PNG files go: NAME.png and dark/NAME.png.

    Returns:
        The figures in the order of the report.
    """
    train = [m for m in metrics if "loss" in m]
    figures: list[Figure] = []

    def add(name: str, caption: str, paint: Callable[[Any, Palette], None], size: tuple[float, float] = (6.4, 3.1)) -> None:
        light, dark = folder / f"{name}.png", folder / "dark" / f"{name}.png"
        for path, palette in ((light, LIGHT), (dark, DARK)):
            _draw(path, palette, paint, size)
        figures.append(Figure(name, caption, light, dark))

    if train:
        add(
            "loss",
            "Loss at each step (thin) and its moving average; dots are held-out data.",
            lambda ax, p: _loss(ax, p, metrics),
        )
    bars = accuracy_bars(results)
    if len(bars) > 1:
        add(
            "accuracy",
            "Share of right answers on held-out examples.",
            lambda ax, p: _bars(ax, p, bars),
            (6.4, 0.7 + 0.55 * len(bars)),
        )
    if len(train) > 1:
        add("learning_rate", "Learning rate.", lambda ax, p: _line(ax, p, train, "lr", "learning rate"), (6.4, 2.3))
        if all("tokens_per_second" in m for m in train):
            add("speed", "Tokens per second.", lambda ax, p: _line(ax, p, train, "tokens_per_second", "tokens / s"), (6.4, 2.3))
    confusion = results.get("confusion")
    if confusion:
        n = len(confusion["labels"])
        add(
            "confusion",
            "Rows: the right label; columns: the answer after training.",
            lambda ax, p: _confusion(ax, p, confusion),
            (min(6.4, 2.2 + 0.6 * n), min(6.0, 1.6 + 0.55 * n)),
        )
    ranks = results.get("adapter", {}).get("ranks")
    if ranks:
        names, blocks, _ = rank_table(ranks)
        caption = "Rank of every adapted module (rows) in every block (columns) after training."
        add("ranks", caption, lambda ax, p: _ranks(ax, p, ranks), _rank_size(len(names), len(blocks)))
    return figures


def draw_ranks(ranks: Mapping[str, int], path: str | Path) -> Path:
    """Draw the ranks of an adapter as a picture: modules by blocks.

    Args:
        ranks: module path -> rank, as `st.report(model).ranks()` gives them.
        path: of the PNG file.

    Raises:
        SpecError: there are no ranks to draw.

    Example:
        >>> draw_ranks({"layers.0.q": 4, "layers.1.q": 2}, folder / "ranks.png")  # doctest: +SKIP
    """
    if not ranks:
        raise SpecError("there are no ranks to draw", hint="only methods that change ranks while they train report them: AdaLoRA, ProgressiveLoRA")
    names, blocks, _ = rank_table(ranks)
    _draw(Path(path), LIGHT, lambda ax, p: _ranks(ax, p, ranks), _rank_size(len(names), len(blocks)))
    return Path(path)


def rank_table(ranks: Mapping[str, int]) -> tuple[list[str], list[int], list[list[int | None]]]:
    """Return (module names, block numbers, rank of each name in each block) of ranks by module path."""
    cells: dict[str, dict[int, int]] = {}
    for path, rank in ranks.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        name = path if at is None else ".".join(parts[at + 1 :]) or parts[at - 1]
        cells.setdefault(name, {})[0 if at is None else int(parts[at])] = rank
    blocks = sorted({b for row in cells.values() for b in row})
    return list(cells), blocks, [[row.get(b) for b in blocks] for row in cells.values()]


def accuracy_bars(results: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    """(label, accuracy, is ours) for the bar chart: baselines first, then before and after."""
    bars = [(str(b["name"]), float(b["accuracy"]), False) for b in results.get("baselines", [])]
    for m in results.get("measures", []):
        if m["name"] == "accuracy":
            bars += [("before training", float(m["before"]), False)] if m.get("before") is not None else []
            bars += [("after training", float(m["after"]), True)]
    return bars


def _draw(path: Path, palette: Palette, paint: Callable[[Any, Palette], None], size: tuple[float, float]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, dpi=160)  # no pyplot: no global state, works beside a user's own figures
    FigureCanvasAgg(canvas)
    ax = canvas.add_subplot()
    canvas.patch.set_alpha(0)
    ax.patch.set_alpha(0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(palette.grid)
    ax.tick_params(colors=palette.faint, labelsize=9, length=0)
    ax.grid(True, color=palette.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    paint(ax, palette)
    canvas.tight_layout(pad=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, transparent=True, metadata={"Software": None})


def _loss(ax: Any, p: Palette, metrics: Sequence[Mapping[str, Any]]) -> None:
    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if "eval_loss" in m]
    steps, losses = [s for s, _ in train], [v for _, v in train]
    ax.plot(steps, losses, color=p.first, linewidth=0.9, alpha=0.35)
    ax.plot(steps, smooth(losses), color=p.first, linewidth=2, label="training")
    if held_out:
        ax.plot(
            [s for s, _ in held_out],
            [v for _, v in held_out],
            color=p.second,
            linewidth=1.6,
            marker="o",
            markersize=5,
            label="held out",
        )
    ax.set_xlabel("step", color=p.faint, fontsize=9)
    ax.set_ylabel("loss", color=p.faint, fontsize=9)
    ordered = sorted([*losses, *(v for _, v in held_out)])
    top = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]  # one early spike must not flatten the rest
    ax.set_ylim(max(0.0, ordered[0] - 0.08 * top), top * 1.12 + 1e-9)
    if held_out:
        ax.legend(frameon=False, fontsize=9, labelcolor=p.ink)


def _line(ax: Any, p: Palette, rows: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    ax.plot([m["step"] for m in rows], [m[key] for m in rows], color=p.first, linewidth=1.8)
    ax.set_xlabel("step", color=p.faint, fontsize=9)
    ax.set_ylabel(label, color=p.faint, fontsize=9)
    ax.set_ylim(bottom=0)


def _bars(ax: Any, p: Palette, bars: Sequence[tuple[str, float, bool]]) -> None:
    rows = list(reversed(bars))
    ax.barh([n for n, _, _ in rows], [v for _, v, _ in rows], color=[p.first if ours else p.muted for _, _, ours in rows], height=0.62)
    ax.set_xlim(0, 1.08)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", labelsize=9.5, colors=p.ink)
    for i, (_, value, ours) in enumerate(rows):
        ax.text(value + 0.012, i, f"{value:.3f}", va="center", fontsize=9.5, color=p.ink, fontweight="bold" if ours else "normal")


def _rank_size(rows: int, columns: int) -> tuple[float, float]:
    return min(9.0, 2.6 + 0.34 * columns), min(8.0, 0.9 + 0.32 * rows)


def _ranks(ax: Any, p: Palette, ranks: Mapping[str, int]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    names, blocks, table = rank_table(ranks)
    top = max(ranks.values(), default=1)
    colours = LinearSegmentedColormap.from_list("one", [p.grid, p.first])
    ax.imshow([[float("nan") if r is None else r for r in row] for row in table], cmap=colours, vmin=0, vmax=max(top, 1), aspect="auto")
    ax.grid(False)
    every = -(-len(blocks) // 24)
    ax.set_xticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]])
    ax.set_yticks(range(len(names)), names)
    if len(blocks) <= 24:
        for i, row in enumerate(table):
            for j, r in enumerate(row):
                if r is not None:
                    ax.text(j, i, str(r), ha="center", va="center", fontsize=8, color="#ffffff" if r > 0.5 * top else p.ink)


def _confusion(ax: Any, p: Palette, confusion: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    labels, counts = confusion["labels"], confusion["counts"]
    shares = [[c / max(1, sum(row)) for c in row] for row in counts]
    colours = LinearSegmentedColormap.from_list("one", [p.grid, p.first])
    ax.imshow(shares, cmap=colours, vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yticks(range(len(labels)), labels)
    if len(labels) <= 12:
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                ax.text(j, i, str(count), ha="center", va="center", fontsize=9, color="#ffffff" if shares[i][j] > 0.5 else p.ink)
