"""What a run amounts to: results.json (everything the report shows), summary.json (a few figures), lines on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimtune.core.registry import spec_class
from slimtune.train.evaluate import Evaluation
from slimtune.train.report import duration, size
from slimtune.train.samples import samples

if TYPE_CHECKING:
    from slimtune.train.engine import RunResult
    from slimtune.train.job import Job
    from slimtune.train.recipe import Recipe


@dataclass(frozen=True)
class Learnt:
    """What training cost and left: steps, seconds, tokens, memory and disk in bytes, what was trained, and ranks that changed, by path."""

    steps: int
    seconds: float
    tokens: int
    peak_bytes: int
    bytes: int
    folder: str
    trainable: int
    percent: float
    modules: str
    ranks: dict[str, int] = field(default_factory=dict)


def outcome(job: Job, spec: Any, learnt: Learnt, held_out: Sequence[Any], before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """results.json.

    Args:
        job: the job, its model as trained.
        spec: what was attached; None for every weight.
        learnt: cost and yield.
        held_out: rows to take samples from.
        before, after: figures on them.
    """
    recipe, method = job.recipe, title(job.recipe, spec)
    rounded = "" if recipe.quantize == "none" else f", {recipe.quantize}"
    return {
        "name": recipe.name,
        "headline": f"{method} on {job.model_name}: {learnt.steps:,} steps in {duration(learnt.seconds)}.",
        "task": job.task,
        "format": job.format,
        "labels": job.labels,
        "answers": job.bundle.candidates,
        "model": {
            "name": job.model_name,
            "source": recipe.model,
            "parameters": job.parameters,
            "bytes": job.model_bytes,
            "dtype": str(job.dtype).removeprefix("torch.") + rounded,
        },
        "adapter": {
            "method": method,
            "trainable": learnt.trainable,
            "percent": learnt.percent,
            "modules": learnt.modules,
            "bytes": learnt.bytes,
            "folder": learnt.folder,
            "ranks": learnt.ranks,
        },
        "training": {
            "steps": learnt.steps,
            "examples": len(job.train_rows),
            "seconds": round(learnt.seconds, 2),
            "tokens": learnt.tokens,
            "tokens_per_second": round(learnt.tokens / max(learnt.seconds, 1e-9), 1),
            "peak_bytes": learnt.peak_bytes,
        },
        "evaluated": after.examples if after else 0,
        "measures": measures(before, after),
        "baselines": [],
        "confusion": {"labels": after.labels, "counts": after.confusion} if after and after.confusion else None,
        "comparison": None,
        "samples": samples(job, held_out, before, after) if held_out else [],
        "exact_answers": bool(after and after.labels),
    }


def measures(before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Rows of the before/after table."""
    if after is None:
        return []
    earlier = before.figures() if before else {}
    return [{"name": k, "before": earlier.get(k), "after": v} for k, v in after.figures().items()]


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The figures a script wants, flat."""
    flat: dict[str, Any] = {}
    for m in results["measures"]:
        key = m["name"].replace(" ", "_").lower()
        flat[f"{key}_before"], flat[f"{key}_after"] = m["before"], m["after"]
    training = results["training"]
    flat |= {"trainable_parameters": results["adapter"]["trainable"], "adapter_bytes": results["adapter"]["bytes"]}
    flat |= {k: training[k] for k in ("steps", "seconds", "tokens", "tokens_per_second", "peak_bytes")}
    return flat


def lines(result: RunResult) -> list[str]:
    """What a finished run says on the screen."""
    r = result.results
    out = []
    for m in r["measures"]:
        earlier = "" if m["before"] is None else f"{m['before']:.4f} -> "
        out.append(f"{m['name']}: {earlier}{m['after']:.4f}")
    t, a = r["training"], r["adapter"]
    out.append(
        f"{a['trainable']:,} parameters trained ({a['percent']:.3f} %), {size(a['bytes'])} on disk beside a model of {size(r['model']['bytes'])}"
    )
    out.append(f"{t['steps']} steps in {duration(t['seconds'])}, {t['tokens_per_second']:,.0f} tokens/s, peak memory {size(t['peak_bytes'])}")
    out.append(f"report: {result.folder.report}")
    return out


def title(recipe: Recipe, spec: Any) -> str:
    """The method with the options that the recipe sets."""
    if spec is None:
        return "full fine-tuning"
    shown = ", ".join(f"{k}={v}" for k, v in recipe.options.items())
    new = len(recipe.add_tokens)
    return f"{spec_class(recipe.method).__name__}({shown})" + (f" and {new} new token{'s' * (new > 1)}" if new else "")


def describe(report: Any) -> str:
    """How many modules an adapter covers, in how many blocks."""
    blocks = {tuple(p for p in r.path.split(".") if p.isdigit())[:1] for r in report.rows}
    where = f" in {len(blocks)} block{'s' * (len(blocks) > 1)}" if blocks - {()} else ""
    return f"{len(report.rows)} modules{where}"
