"""The arena's page: one table a task and a picture of score against trained parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimtune.arena.contenders import TRIALS
from slimtune.arena.run import results
from slimtune.arena.store import Store
from slimtune.arena.tasks import TASKS, Task
from slimtune.train.report import size

HEAD = ("who", "score", "spread", "parameters trained", "s / step", "peak memory of a step", "file", "forgetting", "learning rate")


def write(store: Store, folder: Path) -> list[Path]:
    """Write README.md and a picture for each task that has results; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made, parts = [], [_introduction(store)]
    notes = folder / "notes.md"  # what a person has to say about the figures
    if notes.is_file():
        parts.append(notes.read_text(encoding="utf-8"))
    for task in TASKS:
        rows = results(task, store)
        if not rows:
            continue
        picture = folder / f"{task.name}.png"
        pareto(task, rows, picture)
        made.append(picture)
        parts.append(section(task, rows))
    page = folder / "README.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return [page, *made]


def _introduction(store: Store) -> str:
    versions = sorted({str(c.get("version", {}).get("commit", "?")) for c in store.cells.values()})
    libraries = {k: v for c in store.cells.values() for k, v in c.get("version", {}).items() if k != "commit"}
    hours = sum(float(c.get("took", 0)) for c in store.cells.values()) / 3600
    return "\n".join(
        [
            "# The arena: do they learn?",
            "",
            "Made by `slimtune bench methods`; every cell is a line of `results.jsonl`. Every contender starts from the same model, sees the same",
            "rows in the same order for the same number of steps, and gets the same search:",
            f"{TRIALS} learning rates, the best on validation rows; then the seeds with that one, scored on test rows.",
            "`probe` is a logistic regression on what the frozen model gives a head; it and `tfidf` get as many rows as a run of the others sees.",
            "`peft` rows are the reference library with the same settings under the same Trainer. Methods run with their defaults: this is a",
            "small and honest comparison, not a tuned one, and differences within the spread are none.",
            "",
            "Forgetting is the rise of the loss per token on plain English that has nothing to do with the task. Peak memory is forward and",
            "backward over the model's own weights, exact bytes. The file is what is saved; the base is not in it.",
            "",
            f"Commit(s) {', '.join(versions)}; {', '.join(f'{k} {v}' for k, v in sorted(libraries.items()))}; {hours:.1f} hours so far.",
            "",
        ]
    )


def section(task: Task, rows: list[dict[str, Any]]) -> str:
    """Return a task's table, best first, as Markdown."""
    lines = [
        f"## {task.title}", "", f"{task.steps} steps of {task.batch} rows; {task.test} test rows. Score: "
        + ("accuracy." if task.score == "accuracy" else "1 - phoneme error rate."), "", f"![score against trained parameters]({task.name}.png)", "",
        "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|",
    ]  # fmt: skip
    done = sorted((r for r in rows if r["refused"] is None), key=lambda r: -r["score"])
    for r in done:
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.3f}"
        peak = "" if r["peak_bytes"] is None else size(r["peak_bytes"])
        forgetting = "" if r["forgetting"] is None else f"{r['forgetting']:+.3f}"
        spread = f"{r['spread']:.3f} ({r['seeds']} seeds)" if r["seeds"] > 1 else ""
        lines.append(
            f"| {r['who']} | {r['score']:.3f} | {spread} | {r['trainable']:,} | {seconds} | {peak} "
            f"| {size(r['bytes']) if r['bytes'] else ''} | {forgetting} | {r['lr']:g} |"
        )
    lines += ["", *_behind(done)]
    lines += [*(f"- {r['who']} takes no part: {r['refused']}" for r in rows if r["refused"] is not None), ""]
    return "\n".join(lines)


def _behind(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line about those that a head alone, or the commonest answer, is as good as: such a result must be explained."""
    alone = [r for r in rows if r["name"] in ("head", "probe", "majority")]
    if not alone:
        return []
    best = max(alone, key=lambda r: r["score"])
    behind = [r["who"] for r in rows if r["trainable"] and r["score"] <= best["score"] and r not in alone]
    return [f"- No better than {best['who']} ({best['score']:.3f}): {', '.join(behind)}."] if behind else []


def pareto(task: Task, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw score against trained parameters, with the line of those that nothing smaller beats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 5.5), dpi=130)
    ours = [r for r in rows if r["refused"] is None and r["trainable"] and r["library"] != "peft"]
    theirs = [r for r in rows if r["refused"] is None and r["trainable"] and r["library"] == "peft"]
    flat = [r for r in rows if r["refused"] is None and not r["trainable"]]
    for group, colour, mark, label in ((ours, "#1f6f8b", "o", "slimtune"), (theirs, "#d1813f", "x", "reference library")):
        if group:
            ax.errorbar(
                [r["trainable"] for r in group], [r["score"] for r in group], yerr=[r["spread"] for r in group], fmt=mark, color=colour, label=label,
                capsize=2, alpha=0.85, markersize=5, linewidth=0.8,
            )  # fmt: skip
    front, best = [], float("-inf")
    for r in sorted(ours, key=lambda r: (r["trainable"], -r["score"])):
        if r["score"] > best:
            best = r["score"]
            front.append(r)
    ax.step([r["trainable"] for r in front], [r["score"] for r in front], where="post", color="#1f6f8b", alpha=0.35, linewidth=1.2)
    for r in flat:
        ax.axhline(r["score"], color="#888888", linewidth=0.8, linestyle="--")
        at: Any = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 3), "textcoords": "offset points", "ha": "right"}
        ax.annotate(r["name"], (1, r["score"]), fontsize=7, **at)
    ax.set_xscale("log")
    ax.set_xlabel("parameters trained")
    ax.set_ylabel("accuracy" if task.score == "accuracy" else "1 - phoneme error rate")
    ax.set_title(task.title, loc="left", fontsize=11)
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", fontsize=8)
    fig.tight_layout()
    _label(ax, [(r["name"], r["trainable"], r["score"]) for r in ours])
    fig.savefig(path, metadata={"Software": None})
    plt.close(fig)


def _label(ax: Any, points: list[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, where it covers no other name and no point."""
    pixel = 72 / ax.figure.dpi  # points
    at = [tuple(c * pixel for c in ax.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at]
    for (name, px, py), (x, y) in sorted(zip(points, at, strict=True), key=lambda p: p[1]):
        wide, high = 4.1 * len(name), 8
        spots = [(side, dy) for dy in (3, -9, 12, -18, 21, -27, 30, -36, 39) for side in (5, -5 - wide)]
        boxes = [(x + dx, y + dy, x + dx + wide, y + dy + high) for dx, dy in spots]
        free = (i for i, b in enumerate(boxes) if not any(b[0] < t[2] and t[0] < b[2] and b[1] < t[3] and t[1] < b[3] for t in taken))
        best = next(free, 0)
        taken.append(boxes[best])
        ax.annotate(name, (px, py), xytext=spots[best], textcoords="offset points", fontsize=7)
