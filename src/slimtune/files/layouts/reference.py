"""What all methods of the reference library share in their config: the model, the task, the version."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimtune.core.mixing import base_class

REFERENCE_VERSION = "0.21.2"  # the version whose layout this is
HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip


def task_type(model: nn.Module) -> str | None:
    """Return the reference's name for what a model does, by its class; None if it has none."""
    name = base_class(model).__name__
    if name.endswith("ForConditionalGeneration"):
        config = model.__dict__.get("config")
        return "SEQ_2_SEQ_LM" if config is not None and config.is_encoder_decoder else "CAUSAL_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def about_model(model: nn.Module, tasked: bool = True) -> dict[str, Any]:
    """Return the config fields that describe the base.

    Args:
        tasked: whether to name its task; the reference gives some tasks a trained head.
    """
    task, cls = task_type(model) if tasked else None, base_class(model)
    config = model.__dict__.get("config")
    name = config.__dict__.get("_name_or_path") if config is not None and hasattr(config, "__dict__") else None
    return {
        "base_model_name_or_path": name or None,
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": cls.__name__, "parent_library": cls.__module__},
        "revision": None,
        "peft_version": REFERENCE_VERSION,
    }
