"""Who competes: every registered method with its defaults, all weights, a head alone, TF-IDF, and the reference library where it has the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimtune.arena.tasks import Task

TRIALS = 3  # learning rates tried for everybody: a quarter of the usual one, the usual one, four times it
SEEDS = (0, 1, 2)

# What people start from with each kind of parameter; the search goes both ways from here.
RATES = {
    "full": 1e-4, "head": 2e-2, "ia3": 8e-3, "vera": 2e-2, "ln_tuning": 4e-3, "bitfit": 2e-3, "prompt_tuning": 3e-2, "p_tuning": 1.6e-2,
    "multitask_prompt_tuning": 3e-2, "prefix_tuning": 3e-2, "p_tuning_v2": 3e-2, "trainable_tokens": 8e-3, "adalora": 2e-2, "compacter": 6e-3,
    "bottleneck": 2e-3, "houlsby": 2e-3, "parallel": 5e-4, "mam": 1.2e-4,
}  # fmt: skip
USUAL = 1e-3

FIXED = ("probe", "majority", "tfidf")  # nothing to train by gradient
PARTS = ("dense", "union", "gated")  # what others are made of: "head" is the first, MAM and UniPELT the others


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: a method's registered name, "full", "head", "probe", "tfidf" or "majority".
        library: "slimtune", "peft" or "" (neither).
    """

    name: str
    library: str = "slimtune"

    def __str__(self) -> str:
        return f"peft {self.name}" if self.library == "peft" else self.name

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        if self.name in FIXED:
            return (0.0,)
        usual = RATES.get(self.name, USUAL)
        return tuple(float(f"{usual * f:.1e}") for f in (0.25, 1.0, 4.0))


def contenders(task: Task) -> list[Contender]:
    """Return everybody who takes part in a task."""
    from slimtune.core.registry import methods

    names = [n for n, cls in methods().items() if cls.__module__.startswith("slimtune.")]
    chosen = [n for n in names if (not task.methods or n in task.methods) and n not in PARTS]
    out = [Contender(n) for n in chosen]
    out += [Contender(n, "peft") for n in chosen if n in REFERENCE and (not task.reference or n in task.reference)]
    if task.settings.get("task") == "classification":
        out.append(Contender("head"))
    out.append(Contender("full", ""))
    if task.score == "accuracy":
        out += [Contender(n, "") for n in FIXED]
    return out


# ---- ours -------------------------------------------------------------------------------------------------------------
def spec_of(name: str, task: Task, steps: int) -> Any:
    """Return the spec of a method with its defaults; a classifier's head trains with all of them."""
    from slimtune.core.registry import spec_class

    cls = spec_class("dense" if name == "head" else name)
    options: dict[str, Any] = {}
    fields = {f.name for f in dataclasses.fields(cls)}
    if "total_steps" in fields:
        options["total_steps"] = steps
    if task.settings.get("task") == "classification" and name != "head":
        options["train_modules"] = "head"
    return cls(**options)


# ---- the reference library, with the settings that are our defaults -------------------------------------------------------
def _linear(spec: Any) -> dict[str, Any]:
    return {"r": spec.r, "target_modules": "all-linear"}


def _lora(spec: Any, steps: int, model: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(lora_alpha=2 * spec.r, **_linear(spec))


def _dora(spec: Any, steps: int, model: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(lora_alpha=2 * spec.of.r, use_dora=True, **_linear(spec.of))


def _vera(spec: Any, steps: int, model: Any) -> Any:
    from peft import VeraConfig

    return VeraConfig(r=spec.r, d_initial=spec.d_start, target_modules="all-linear", save_projection=False)


def _ia3(spec: Any, steps: int, model: Any) -> Any:
    from peft import IA3Config

    return IA3Config()


def _ln(spec: Any, steps: int, model: Any) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=".*LayerNorm|.*layernorm|.*norm")


def _adalora(spec: Any, steps: int, model: Any) -> Any:
    from peft import AdaLoraConfig

    t_init, t_final = spec.times(steps)
    same = {
        "init_r": spec.init_r, "target_r": spec.target_r, "tinit": t_init, "tfinal": t_final, "deltaT": spec.delta_t,
        "beta1": spec.beta1, "beta2": spec.beta2, "lora_alpha": 2 * spec.init_r, "orth_reg_weight": spec.orthogonality,
    }  # fmt: skip
    return AdaLoraConfig(total_step=steps, target_modules="all-linear", **same)


def _prompt(spec: Any, steps: int, model: Any) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=spec.tokens)


def _multitask(spec: Any, steps: int, model: Any) -> Any:
    from peft import MultitaskPromptTuningConfig

    return MultitaskPromptTuningConfig(num_virtual_tokens=spec.tokens, num_tasks=spec.tasks, num_ranks=spec.r)


def _p_tuning(spec: Any, steps: int, model: Any) -> Any:
    from peft import PromptEncoderConfig

    size = {} if spec.hidden is None else {"encoder_hidden_size": spec.hidden}  # both start from the width of the model
    return PromptEncoderConfig(num_virtual_tokens=spec.tokens, encoder_reparameterization_type=spec.encoder.upper(), **size)


def _prefix(spec: Any, steps: int, model: Any) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=spec.p)


def _tokens(spec: Any, steps: int, model: Any) -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(token_indices=list(spec.sites(model)[0].tokens))


REFERENCE: dict[str, Callable[[Any, int, Any], Any]] = {
    "lora": _lora, "dora": _dora, "vera": _vera, "ia3": _ia3, "ln_tuning": _ln, "adalora": _adalora, "prompt_tuning": _prompt,
    "multitask_prompt_tuning": _multitask, "p_tuning": _p_tuning, "prefix_tuning": _prefix, "trainable_tokens": _tokens,
}  # fmt: skip
