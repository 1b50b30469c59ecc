"""Prompt tuning, P-tuning and multitask prompt tuning in the reference's layout: their tensors stand beside the user's model.

    prompt_embeddings [p, d]                      the virtual tokens; of P-tuning, what the network makes
    prefix_task_cols [T, p, r], prefix_task_rows [T, r, d]     the factors of the tasks
    base_model.X.weight, .bias                    modules trained in full beside it (a head)

For an encoder-decoder the reference keeps 2 p rows (num_transformer_submodules: 2): p of the encoder, then p of the decoder. Prompt tuning and
P-tuning never use the second half; multitask prompts put it in front of the decoder's tokens when they are given labels.

A head outside of the body that reads the first place reads the first virtual token there, and so it does here (`keep`).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimtune.core.errors import FormatError, MismatchError, TargetError
from slimtune.core.kind import Kind
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import OUTSIDE, Codec, Layout, Place, Taker
from slimtune.files.layouts.config import RANK, SHARE, TARGETS, Fields, check_config
from slimtune.files.layouts.full import FullCodec
from slimtune.files.layouts.modular import paths_of
from slimtune.files.layouts.patterns import shortest
from slimtune.files.layouts.reading import drop_absent_heads, other_places, sensible
from slimtune.files.layouts.reference import HEADS, about_model
from slimtune.methods.multitask_prompt import MultitaskPromptTuning
from slimtune.methods.p_tuning import PTuning
from slimtune.methods.prompt_tuning import PromptTuning
from slimtune.ports.body import pairs, prompted, study

NAMES = {"prompt": "prompt_embeddings", "u": "prefix_task_cols", "v": "prefix_task_rows"}  # in the op -> in the file
HALVED = {"prompt": 0, "u": 1}  # of which dimension the decoder has the second half
_NEVER = re.compile(r"(?!)")  # no tensor of a module is the method's own
_COMMON: dict[str, Any] = {
    "modules_to_save": None, "num_attention_heads": None, "num_layers": None, "num_transformer_submodules": None, "num_virtual_tokens": None,
    "token_dim": None,
}  # fmt: skip
_TYPES = {
    "modules_to_save": TARGETS["modules_to_save"], "num_virtual_tokens": RANK, "token_dim": RANK,
    "num_transformer_submodules": ("1 or 2", lambda v: v in (1, 2)),
}  # fmt: skip
_START = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None, "tokenizer_name_or_path": None}
_SOURCE = {"prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0}
_FREE = frozenset({"num_attention_heads", "num_layers", *_START, *_SOURCE})


class PromptCodec(Codec):
    """The tensors of a body; those of a decoder stand behind those of its encoder."""

    def __init__(self, layout: PromptLayout) -> None:
        self.layout = layout

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        if place.port != "stream" or place.path == self.layout.decoder:
            return {}
        out = op.export(module)
        behind = self.layout.behind
        if behind is not None:
            more = behind.export(module)
            out = {k: torch.cat([t, more[k]], HALVED[k]) if k in HALVED else t for k, t in out.items()}
        return {NAMES[k]: t for k, t in out.items()}

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        out: dict[str, Tensor | None] = {}
        for name, shape in op.expects(module).items():
            whole = file.take(NAMES[name])
            dim = HALVED.get(name)
            if whole is not None and dim is not None and whole.dim() > dim and whole.shape[dim] == 2 * shape[dim]:
                whole = whole.chunk(2, dim)[1 if place.path == self.layout.decoder else 0]
            out[name] = whole
        return out


class PromptLayout(Layout):
    """What the three share; a subclass is one peft_type.

    Attributes:
        decoder: path of a decoder with virtual tokens of its own, or None.
        behind: the op there, while writing.
    """

    fields: ClassVar[Fields]

    def __init__(self) -> None:
        self.decoder: str | None = None
        self.behind: Any = None

    # ---- names --------------------------------------------------------------------------------------------------
    def names(self, file: TensorFile) -> dict[str, str]:
        return {name.removeprefix(OUTSIDE): name for name in file.entries}

    def stored(self, name: str) -> str:
        return name if name in NAMES.values() else OUTSIDE + name

    def codec(self, method: str) -> Codec:
        return FullCodec() if method == "dense" else PromptCodec(self)

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        readers = {p.path for p in places if p.port == "reader"}
        self.decoder = next((p.path for p in places if p.port == "stream" and p.path in readers), None)

    # ---- writing ------------------------------------------------------------------------------------------------
    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        by_method, about = paths_of(adapter), about_model(model)
        if set(by_method) - {*self.methods, "dense"}:
            return "it holds ops of other methods"
        ops: dict[str, Any] = {path: op for (path, _), op in adapter.ops.items() if op.port == "stream"}
        try:
            bodies, readers = prompted(model)
        except TargetError:
            return "the reference puts virtual tokens in front of transformers models only"
        if about["task_type"] is None or (pairs(model) and about["task_type"] != "SEQ_2_SEQ_LM"):
            return "the reference runs no prompt on such a model"
        if len(bodies) != 1 or list(bodies) != [path for path in ops if path not in readers]:
            return "there is more than one body, or another one has the prompt"
        if averages(model):
            return "the reference averages over virtual tokens, too"
        if not readers and next(iter(ops.values())).keep is not first_place(model):
            return "a head that reads the first place would read another one in the reference"
        self.behind = next((op for path, op in ops.items() if path in readers), None)
        if self.behind is not None:
            if self.peft_type != MultitaskLayout.peft_type:
                return "the reference uses no virtual tokens of a decoder with this method"
            if not torch.equal(self.behind.v, next(iter(ops.values())).v):
                return "encoder and decoder have one prefix_task_rows in the reference"
        whole = self.saved(adapter, model) is not None
        return "" if whole else "the reference wants the whole head of a classifier in the file, and names for the rest"

    def saved(self, adapter: Adapter, model: nn.Module) -> list[str] | None:
        """Return `modules_to_save`: names of the modules that are trained in full; None if there are none that say just this.

        Under a task with a head the reference trains the whole head, and looks for all of it in the file.
        """
        modules = base_modules(model)
        left = set(paths_of(adapter).get("dense", {}))
        names = []
        for head in HEADS.get(about_model(model)["task_type"] or "", set()):
            for path in [p for p in modules if p.endswith(head)]:  # letter by letter, as the reference does: pre_classifier, too
                parts = {p for p, m in modules.items() if (p == path or p.startswith(f"{path}.")) and any(True for _ in m.parameters(recurse=False))}
                if not parts <= left:
                    return None
                left -= parts
                names.append(head)
        short = [shortest(p, list(modules)) for p in left]
        return None if None in short else sorted({*names, *(n for n in short if n is not None)})

    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        op: Any = next(op for op in adapter.ops.values() if op.port == "stream")
        shapes = op.expects(nn.Identity())
        base: Any = model.config
        text = base.get_text_config()
        return {
            **self.fields.all(self.peft_type), "inference_mode": True, **about_model(model), "modules_to_save": self.saved(adapter, model) or None,
            "num_virtual_tokens": op.tokens, "token_dim": shapes["prompt"][1], "num_transformer_submodules": 1 if self.behind is None else 2,
            "num_attention_heads": text.num_attention_heads, "num_layers": text.num_hidden_layers, **self.options(adapter.spec, shapes),
        }  # fmt: skip

    def options(self, spec: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the config fields of the method itself."""
        return {}

    # ---- reading ------------------------------------------------------------------------------------------------
    def recipe(self, config: dict[str, Any], **common: Any) -> Spec:
        """Return the spec that a config describes."""
        raise NotImplementedError

    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        two = bool(pairs(model))
        if config.get("num_transformer_submodules") is None:
            config["num_transformer_submodules"] = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
        check_config(config, file.path, relax, self.fields)
        taker, p, d = Taker(file, self.names(file)), config["num_virtual_tokens"], config["token_dim"]
        if NAMES["prompt"] not in taker:
            raise FormatError(f"{file.path.name} holds no {NAMES['prompt']}", where=str(file.path))
        stacks = config["num_transformer_submodules"]
        if taker.shape(NAMES["prompt"]) != (p * stacks, d):
            raise MismatchError(
                f"{NAMES['prompt']} is {list(taker.shape(NAMES['prompt']))}, the config says {[p * stacks, d]}",
                where=str(file.path),
                hint="the two files do not belong together",
            )
        bodies, readers = prompted(model)
        wide = {path: study(m).width for path, m in bodies.items()}
        if len(bodies) != 1 or set(wide.values()) != {d} or (stacks == 2 and not two):
            raise MismatchError(
                f"the adapter has {stacks} x {p} virtual tokens of width {d} for one model, this {type(model).__name__} has bodies of width "
                + ", ".join(f"{w} ({path or 'itself'})" for path, w in wide.items()),
                where=str(file.path),
                hint="is it the right base?",
            )
        if averages(model):
            raise MismatchError(
                "in the reference the head of this classifier averages over the virtual tokens, too, which it does not here",
                where=f"classifier_pooling='mean' of {type(model).__name__}",
                hint="train a prompt here: st.attach(model, st.PromptTuning())",
            )
        modules = base_modules(model)
        drop_absent_heads(config, modules)
        both = stacks == 2 and self.peft_type == MultitaskLayout.peft_type
        keep = first_place(model) and config["task_type"] == "SEQ_CLS"
        method = self.methods[0]
        places = [Place(path, "stream", "stream", "weight", method, {"tokens": p, "keep": keep or bool(readers)}) for path in bodies]
        for path in readers:
            places.append(Place(path, "reader", "reader", "weight", method, {"tokens": p}))
            places += [Place(path, "stream", "stream", "weight", method, {"tokens": p, "keep": False})] if both else []
        places += other_places(taker, modules, config, set(bodies), _NEVER)
        trained = tuple(dict.fromkeys(place.path for place in places if place.method == "dense"))
        self.prepare(places, model)
        return sensible(self.recipe(config, tokens=p, keep=keep, decoder=both, train_modules=trained)), places, taker


class PromptTuningLayout(PromptLayout):
    """peft_type PROMPT_TUNING."""

    peft_type = "PROMPT_TUNING"
    methods = ("prompt_tuning",)
    fields = Fields({**_COMMON, **_START}, free=_FREE, types=_TYPES)

    def recipe(self, config: dict[str, Any], **common: Any) -> Spec:
        return PromptTuning(**common)


class PTuningLayout(PromptLayout):
    """peft_type P_TUNING."""

    peft_type = "P_TUNING"
    methods = ("p_tuning",)
    fields = Fields(
        {
            **_COMMON, "encoder_dropout": 0.0, "encoder_hidden_size": None, "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        },
        free=_FREE,
        types={
            **_TYPES, "encoder_dropout": SHARE, "encoder_num_layers": RANK, "encoder_hidden_size": RANK,
            "encoder_reparameterization_type": ("MLP or LSTM", lambda v: v in ("MLP", "LSTM")),
        },
    )  # fmt: skip

    def options(self, spec: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {
            "encoder_reparameterization_type": spec.encoder.upper(), "encoder_hidden_size": spec.hidden or shapes["prompt"][1],
            "encoder_num_layers": spec.encoder_layers, "encoder_dropout": spec.dropout,
        }  # fmt: skip

    def recipe(self, config: dict[str, Any], **common: Any) -> Spec:
        lstm = config["encoder_reparameterization_type"] == "LSTM"
        dropout = float(config["encoder_dropout"]) if lstm and config["encoder_num_layers"] > 1 else 0.0  # elsewhere it never acts
        layers = config["encoder_num_layers"]
        return PTuning(encoder="lstm" if lstm else "mlp", hidden=config["encoder_hidden_size"], encoder_layers=layers, dropout=dropout, **common)


class MultitaskLayout(PromptLayout):
    """peft_type MULTITASK_PROMPT_TUNING."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    methods = ("multitask_prompt_tuning",)
    fields = Fields(
        {**_COMMON, **_START, **_SOURCE, "num_ranks": 1, "num_tasks": 1}, free=_FREE, types={**_TYPES, "num_ranks": RANK, "num_tasks": RANK}
    )

    def options(self, spec: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"num_tasks": shapes["v"][0], "num_ranks": shapes["v"][1]}

    def recipe(self, config: dict[str, Any], **common: Any) -> Spec:
        return MultitaskPromptTuning(tasks=config["num_tasks"], r=config["num_ranks"], **common)


def averages(model: nn.Module) -> bool:
    """Tell whether the head of a classifier averages over all places."""
    config: Any = model.__dict__.get("config")
    return about_model(model)["task_type"] == "SEQ_CLS" and hasattr(config, "classifier_pooling") and config.classifier_pooling == "mean"


def first_place(model: nn.Module) -> bool:
    """Tell whether the head of a model reads the first place of what its body gives: a bidirectional classifier without a pooler inside."""
    if about_model(model)["task_type"] != "SEQ_CLS" or pairs(model):
        return False
    bodies = list(prompted(model)[0].values())
    return all(not study(body).causal and body._modules.get("pooler") is None for body in bodies)
