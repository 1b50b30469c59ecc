"""From the figures of `benchmarks.run` to README.md and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, Any]
COLUMNS = (
    "model", "dtype", "method", "dropout", "labels masked", "kept, peft", "kept, slimtune", "ratio", "peak ratio", "step, peft", "step, slimtune",
    "ratio", "the floor, of peft's", "over the floor", "peft over the floor",
)  # fmt: skip

_COMPILED = {"": "", "whole": ", compiled", "blocks": ", blocks compiled"}

FLOOR = """The floor is forward plus input gradients of the bare model in the same lean forms, measured in the same run: what every method that
trains through the whole model must pay. It is not compiled, and the compiled rows' bytes are those of the plain run."""


def write(results: Results, folder: Path) -> str:
    """Write every page and picture; return the text of README.md."""
    pictures = [picture(results, folder) for picture in (bars, loss, growth)]
    parts = [head(results), *(f"![{text}]({name})\n" for name, text in filter(None, pictures)), steps(results), *rest(results)]
    text = "\n".join(parts)
    (folder / "README.md").write_text(text)
    return text


def head(r: Results) -> str:
    env = ", ".join(f"{k} {v}" for k, v in r["environment"].items())
    return f"""# Beside the reference library

Made by `make bench`; one part alone: `python -m benchmarks.run --only steps`. SmolLM2-135M and MiniLM have their real weights. LoRA or DoRA r=16
on every linear layer of the blocks, AdamW, 4 x 256 tokens unless it says otherwise. Bytes are exact: every storage is counted when it is made and
when it goes. Seconds are medians of steps that take turns, those of the first two tables each in a process of its own; every raw
sample is in `results.json`. {env}.
"""


def steps(r: Results) -> str:
    lines = ["## A training step", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for s in r.get("steps", []):
        c, b, q, m = s["case"], s["bytes"], s["ratio"], s["median"]
        kept = [f"{b[who]['kept_mib']:.0f} MiB" for who in ("reference", "slimtune")]
        model = c["model"] + _COMPILED[c["compiled"]]
        lines.append(
            f"| {model} | {c['dtype']} | {c['method']} | {c['dropout']} | {c['masked']:.0%} | {kept[0]} | {kept[1]} "
            f"| {q['kept']:.2f} | {q['peak']:.2f} | {m['reference']:.2f} s | {m['slimtune']:.2f} s | {q['time']:.2f} "
            f"| {q['floor']:.2f} | {q['over_floor']:.2f} | {q['reference_over_floor']:.2f} |"
        )
    lines += ["", FLOOR, ""]
    return "\n".join(lines)


def rest(r: Results) -> list[str]:
    """Return the other sections, those that were measured."""
    out: list[str] = []
    if r.get("dora"):
        lines = ["## DoRA over LoRA, one training step", "", "| dtype | slimtune | peft |", "|---|---|---|"]
        lines += [f"| {x['dtype']} | {x['ratio']['slimtune']:.2f} | {x['ratio']['reference']:.2f} |" for x in r["dora"]]
        out.append("\n".join([*lines, ""]))
    out += [levers(x) for x in r.get("levers", [])]
    if r.get("mixed"):
        lines = ["## A different adapter for each row, 1 token a row, no gradients, another mixture at each step", ""]
        lines += ["| rows, adapters of a batch, rank | adapters on the model | over the base, slimtune | over the base, peft | times faster |"]
        lines += ["|---|---|---|---|---|"]
        for x in r["mixed"]:
            for y in x.get("resident") or [{"resident": x["adapters"], **x}]:
                beside = f"{y['reference_over_base']:.1f} | {y['times_faster']:.1f}" if "reference_over_base" in y else " | "
                lines.append(f"| {x['rows']}, {x['adapters']}, {x.get('r', 16)} | {y['resident']} | {y['mixed_over_base']:.2f} | {beside} |")
        out.append("\n".join([*lines, ""]))
    for x in r.get("many", []):
        theirs = x.get("reference")
        beside = [f"{theirs['attach_ratio']:.2f}", f"{theirs['switch_seconds'] * 1e3:.0f} ms"] if theirs else ["", ""]
        out.append(
            f"## {x['adapters']} adapters on one model\n\n"
            "| | slimtune | peft |\n|---|---|---|\n"
            f"| attach: the last over the first | {x['attach_ratio']:.2f} | {beside[0]} |\n"
            f"| load: the last over the first | {x['load_ratio']:.2f} | |\n"
            f"| load all of them | {x['load_all_seconds']:.1f} s | |\n"
            f"| switch | {x['switch_seconds'] * 1e3:.2f} ms | {beside[1]} |\n"
            f"| a forward among {x['adapters'] - 1} idle ones over one alone | {x['idle']['ratio']:.3f} | |\n"
        )
    if r.get("decode"):
        lines = ["## Writing token by token, batch 1, one unmerged adapter", ""]
        lines += ["| dtype | over the base, slimtune | over the base, peft |", "|---|---|---|"]
        lines += [f"| {x['dtype']} | {x['over_base']['slimtune']:.2f} | {x['over_base']['reference']:.2f} |" for x in r["decode"]]
        out.append("\n".join([*lines, ""]))
    for x in r.get("trunk", []):
        over = x["cached_over"]
        out.append(
            f"## The trunk cache, {x['layers']} of 30 blocks adapted, second epoch on ({x['dtype']})\n\n"
            f"A step takes {over['reference']:.2f} of the reference's at full depth, {over['full depth']:.2f} of ours at full depth, "
            f"{over['uncached']:.2f} of the uncached one; outputs are {'equal to the bit' if x['equal_bits'] else 'NOT EQUAL'}. {x['cache']}.\n"
        )
    for x in r.get("head", []):
        out.append(
            f"## Output head and loss, {x['masked']:.0%} of the tokens without a label ({x['dtype']})\n\n"
            f"Kept {x['lean']['kept_mib']:.0f} of {x['plain']['kept_mib']:.0f} MiB ({x['ratio']['kept_mib']:.2f}), "
            f"peak {x['lean']['peak_mib']:.0f} of {x['plain']['peak_mib']:.0f} MiB ({x['ratio']['peak_mib']:.2f}).\n"
        )
    for x in r.get("loss", []):
        out.append(
            f"## {x['steps']} steps on reviews ({x['dtype']})\n\nLargest gap between the two losses {x['largest_gap']:.2e}, "
            f"mean {x['mean_gap']:.2e}; mean of the last 20: {x['last_20_mean']['slimtune']:.5f} and {x['last_20_mean']['reference']:.5f}.\n"
        )
    for x in r.get("growth", []):
        lines = ["## How a training step grows", "", "| with | from, to | times as many | seconds | times as long |", "|---|---|---|---|---|"]
        for name, points in x["curves"].items():
            a, b = points[0], points[-1]
            times = f"{b['x'] / a['x']:.0f} | {a['seconds']:.3f}, {b['seconds']:.3f} | {b['seconds'] / a['seconds']:.2f}"
            lines.append(f"| {name} | {a['x']}, {b['x']} | {times} |")
        out.append("\n".join([*lines, ""]))
    for x in r.get("combine", []):
        out.append("## Combining two adapters of rank 16 by SVD\n\n" + facts(x) + "\n")
    for x in r.get("meta", []):
        out.append("## Attaching LoRA to a 70B-shaped Llama without weights\n\n" + facts(x) + "\n")
    for x in r.get("import", []):
        lines = ["## Importing, processor seconds over `import torch`", "", "| | seconds |", "|---|---|"]
        lines += [f"| {name} | {s:.3f} |" for name, s in x["seconds_over_torch"].items()]
        out.append("\n".join([*lines, ""]))
    return out


def levers(x: Results) -> str:
    """Return what each lever is worth, and what no lever can touch."""
    s, kept = x["median"], x["kept_mib"]
    lines = [f"## What each lever is worth (SmolLM2, {x['dtype']}, LoRA without dropout)", ""]
    lines += ["| without | step | kept for backward |", "|---|---|---|"]
    for name, seconds in s.items():
        if name in kept:
            what = {"all": "none of them left out", "everything": "everything: plain autograd"}.get(name, name)
            lines.append(f"| {what} | {seconds:.2f} s ({seconds / s['all']:.2f}x) | {kept[name]:.0f} MiB |")
    alone = s["products alone"]
    flops = x["products_flops"] / 1e9
    text = (
        f"The products with the frozen weights alone, forward and for input gradients, are {flops:.0f} GFLOP and take {alone:.2f} s here "
        f"({flops / alone:.0f} GFLOP/s): {alone / s['all']:.2f} of a step. Nothing that trains through the whole model can go below."
    )
    return "\n".join([*lines, "", text, ""])


def facts(x: Results) -> str:
    """Return the plain figures of a benchmark as one line."""
    return ", ".join(f"{k.replace('_', ' ')} {f'{v:.3g}' if isinstance(v, float) else v}" for k, v in x.items() if not isinstance(v, (list, dict)))


# ---- pictures ---------------------------------------------------------------------------------------------------------
def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 4)) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, dpi=130, squeeze=False)


def bars(r: Results, folder: Path) -> tuple[str, str] | None:
    """Draw ours over the reference's, bytes and time, for every step."""
    if not r.get("steps"):
        return None
    names, kept, time = [], [], []
    for s in r["steps"]:
        c = s["case"]
        words = [c["model"], c["dtype"].replace("bfloat", "bf").replace("float", "fp"), c["method"]]
        words += [f"dropout {c['dropout']}"] * bool(c["dropout"]) + ["70 % masked"] * bool(c["masked"])
        words += [_COMPILED[c["compiled"]].removeprefix(", ")] * bool(c["compiled"])
        names.append(", ".join(words))
        kept.append(s["ratio"]["kept"])
        time.append(s["ratio"]["time"])
    fig, axes = _figure(size=(9, 0.55 * len(names) + 1.4))
    ax = axes[0][0]
    at = range(len(names))
    ax.barh([i - 0.19 for i in at], kept, 0.36, label="bytes kept for backward", color="#1f6f8b")
    ax.barh([i + 0.19 for i in at], time, 0.36, label="time of a step", color="#d1813f")
    for i in at:
        ax.text(kept[i] + 0.01, i - 0.19, f"{kept[i]:.2f}", va="center", fontsize=7)
        ax.text(time[i] + 0.01, i + 0.19, f"{time[i]:.2f}", va="center", fontsize=7)
    ax.axvline(1, color="#888888", linewidth=1)
    ax.text(1.005, len(names) - 0.45, "reference library", fontsize=7, color="#555555")
    ax.set_yticks(list(at), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_title("slimtune over the reference library (less is better)", loc="left", fontsize=10)
    ax.set_xlim(0, 1.3)
    ax.legend(fontsize=8, loc="upper right")
    fig.tight_layout()
    fig.savefig(folder / "steps.png", metadata={"Software": None})
    return "steps.png", "bytes and time of a step over the reference library's"


def loss(r: Results, folder: Path) -> tuple[str, str] | None:
    """Draw the two loss curves and their gap."""
    if not r.get("loss"):
        return None
    x = r["loss"][0]
    a, b = x["losses"]["slimtune"], x["losses"]["reference"]
    fig, axes = _figure(2, 1, (9, 4.6))
    top, bottom = axes[0][0], axes[1][0]
    top.plot(b, color="#d1813f", linewidth=3, alpha=0.6, label="reference library")
    top.plot(a, color="#1f6f8b", linewidth=1, label="slimtune")
    top.set_ylabel("loss")
    top.legend(fontsize=8)
    bottom.semilogy([max(abs(p - q), 1e-9) for p, q in zip(a, b, strict=True)], color="#555555", linewidth=0.9)
    bottom.set_ylabel("gap")
    bottom.set_xlabel("step")
    fig.tight_layout()
    fig.savefig(folder / "loss.png", metadata={"Software": None})
    return "loss.png", "the losses of 200 steps, ours and the reference library's, and their gap"


def growth(r: Results, folder: Path) -> tuple[str, str] | None:
    """Draw every growth curve, relative to a line through its first and last point."""
    if not r.get("growth"):
        return None
    curves = r["growth"][0]["curves"]
    fig, axes = _figure(1, len(curves), (3 * len(curves), 3.2))
    for ax, (name, points) in zip(axes[0], curves.items(), strict=True):
        xs, ys = [p["x"] for p in points], [p["seconds"] for p in points]
        ax.plot(xs, ys, "o-", color="#1f6f8b", markersize=3)
        if name == "resident adapters":
            ax.set_xscale("log")
        else:
            ax.plot([xs[0], xs[-1]], [ys[0], ys[-1]], "--", color="#aaaaaa", linewidth=0.8)
        ax.set_ylim(0, 1.15 * max(ys))
        ax.set_title(name, fontsize=9)
        ax.grid(alpha=0.25)
    axes[0][0].set_ylabel("seconds a step")
    fig.tight_layout()
    fig.savefig(folder / "growth.png", metadata={"Software": None})
    return "growth.png", "seconds of a step against tokens, rank, adapted modules, depth and resident adapters"
