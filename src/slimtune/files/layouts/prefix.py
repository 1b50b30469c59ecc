"""Prefix tuning in the reference's layout: one tensor for all layers.

    prompt_embeddings [p, 2 L heads width]: for each token, of each layer its key, then its value
    base_model.X.weight, .bias: modules trained in full beside it (a head), in full, under their own names

An encoder-decoder has keys and values in its decoder's attention to its own tokens only, and there the reference lays the list of 2 L entries
down twice and hands four entries to each layer, of which it uses the first two: layer l has the entries 4 l and 4 l + 1, counted round. With an
even L, layers l and l + L / 2 thus share theirs; ours that differ there are written in a layout of our own.

A prefix that a network makes is written as what the network makes, which is all that others read; the network follows under names of ours.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import FormatError, MismatchError
from slimtune.core.kind import Kind
from slimtune.core.placing import base_modules
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.core.targets import find_sites
from slimtune.files.container import TensorFile
from slimtune.files.layouts.base import OUTSIDE, Codec, Layout, Place, Taker, dotted
from slimtune.files.layouts.config import FLAG, RANK, TARGETS, Fields, check_config
from slimtune.files.layouts.full import FullCodec
from slimtune.files.layouts.modular import paths_of
from slimtune.files.layouts.patterns import shortest
from slimtune.files.layouts.reading import drop_absent_heads, kind_known, other_places, sensible
from slimtune.files.layouts.reference import about_model
from slimtune.methods.prefix_tuning import PrefixTuning, crosses, moved, part_of, two_stacks

WHOLE = "prompt_embeddings"
NETWORK = "slimtune_prefix"
_NEVER = re.compile(r"(?!)")  # no tensor of a module is the method's own


class PrefixCodec(Codec):
    """The share of one layer in the one tensor; the first layer writes it all."""

    def __init__(self, layout: PrefixLayout) -> None:
        self.layout = layout

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        out = {} if place.path != self.layout.order[0] else {WHOLE: self.layout.whole()}
        return out | {self.name(place, n): t for n, t in op.export(module).items() if n not in ("K", "V")}

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        whole = file.take(WHOLE)
        wants = op.expects(module)
        if "K" not in wants:
            return {name: file.take(self.name(place, name)) for name in wants}
        if whole is None:
            return {"K": None, "V": None}
        p, heads, width = wants["K"]
        L = len(self.layout.order)
        if whole.shape != (p, 2 * L * heads * width):
            raise MismatchError(
                f"{WHOLE} is {list(whole.shape)}, {L} layers of this model need {[p, 2 * L * heads * width]}",
                where=str(file.file.path),
                hint="this adapter was made for another base model",
            )
        k, v = self.layout.entries(place.path)
        each = whole.view(p, 2 * L, heads, width)
        return {"K": each[:, k], "V": each[:, v]}

    def name(self, place: Place, tensor: str) -> str:
        return dotted(NETWORK, "" if tensor in ("P", "W1", "b1") else place.path, tensor)


class PrefixLayout(Layout):
    """peft_type PREFIX_TUNING.

    Attributes:
        order: the paths of the attention layers, first to last, once `prepare` ran.
        twice: the model is an encoder-decoder.
    """

    peft_type = "PREFIX_TUNING"
    methods = ("prefix_tuning", "p_tuning_v2")
    fields = Fields(
        {
            "encoder_hidden_size": None, "init_weights": None, "modules_to_save": None, "num_attention_heads": None, "num_layers": None,
            "num_transformer_submodules": None, "num_virtual_tokens": None, "prefix_projection": False, "token_dim": None,
        },
        free=frozenset({"encoder_hidden_size", "init_weights"}),
        types={
            "modules_to_save": TARGETS["modules_to_save"], "num_virtual_tokens": RANK, "num_attention_heads": RANK, "num_layers": RANK,
            "token_dim": RANK, "prefix_projection": FLAG, "num_transformer_submodules": ("1 or 2", lambda v: v in (1, 2)),
        },
    )  # fmt: skip

    def __init__(self) -> None:
        self.order: list[str] = []
        self.twice = False
        self.ops: dict[str, Any] = {}

    # ---- names --------------------------------------------------------------------------------------------------
    def names(self, file: TensorFile) -> dict[str, str]:
        return {name.removeprefix(OUTSIDE): name for name in file.entries}

    def stored(self, name: str) -> str:
        return name if name == WHOLE or name.startswith(NETWORK) else OUTSIDE + name

    def codec(self, method: str) -> Codec:
        return FullCodec() if method == "dense" else PrefixCodec(self)

    def prepare(self, places: list[Place], model: nn.Module) -> None:
        mine = {p.path for p in places if p.port == "attention"}
        self.order = [path for path in base_modules(model) if path in mine]
        self.twice = two_stacks(model)

    def entries(self, path: str) -> tuple[int, int]:
        """Return which of the 2 L entries are the key and the value of a layer."""
        i, n = self.order.index(path), 2 * len(self.order)
        return (4 * i % n, (4 * i + 1) % n) if self.twice else (2 * i, 2 * i + 1)

    # ---- writing ------------------------------------------------------------------------------------------------
    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        self.ops = {path: op for (path, _), op in adapter.ops.items() if op.port == "attention"}
        about = about_model(model)
        if set(paths_of(adapter)) - {*self.methods, "dense"} or len({op.method for op in self.ops.values()}) != 1:
            return "it holds ops of other methods"
        if about["task_type"] is None:
            return "the reference runs no prefix on such a model"
        sites = layers_of(model)
        if list(self.ops) != [s.path for s in sites]:
            return "not every layer of the decoder, or some other, has keys and values"
        if stays(model, sites):
            return "tokens come after the prefix there, which this model has no argument for"
        if len({tuple(t.shape) for op in self.ops.values() for t in op.rows()}) != 1:
            return "layers differ in the number or width of their heads"
        full = paths_of(adapter).get("dense", {})
        if not all(shortest(p, list(base_modules(model))) for p in full):
            return "a fully trained module has no name of its own"
        self.order, self.twice = list(self.ops), two_stacks(model)
        held: dict[int, Tensor] = {}
        for path, op in self.ops.items():
            for i, t in zip(self.entries(path), op.rows(), strict=True):
                if not torch.equal(held.setdefault(i, t), t):
                    return "the reference gives the same keys and values to two layers that differ here"
        return ""

    def whole(self) -> Tensor:
        """Return prompt_embeddings."""
        first = next(iter(self.ops.values())).rows()[0]
        out = first.new_zeros(first.shape[0], 2 * len(self.order), *first.shape[1:])
        with torch.no_grad():
            for path, op in self.ops.items():
                for i, t in zip(self.entries(path), op.rows(), strict=True):
                    out[:, i] = t
        return out.flatten(1)

    def config(self, adapter: Adapter, model: nn.Module) -> dict[str, Any]:
        p, heads, width = next(iter(self.ops.values())).rows()[0].shape
        modules = list(base_modules(model))
        full = sorted({str(shortest(path, modules)) for path in paths_of(adapter).get("dense", {})})
        return {
            **self.fields.all(self.peft_type), "inference_mode": True, **about_model(model), "encoder_hidden_size": heads * width,
            "modules_to_save": full or None, "num_attention_heads": heads, "num_layers": len(self.order),
            "num_transformer_submodules": 2 if self.twice else 1, "num_virtual_tokens": p, "token_dim": heads * width,
        }  # fmt: skip

    # ---- reading ------------------------------------------------------------------------------------------------
    def discover(self, config: dict[str, Any], file: TensorFile, model: nn.Module, relax: frozenset[str]) -> tuple[Spec, list[Place], Taker]:
        check_config(config, file.path, relax, self.fields)
        taker, sites, p = Taker(file, self.names(file)), layers_of(model), config["num_virtual_tokens"]
        layers = [s.path for s in sites]
        if WHOLE not in taker:
            raise FormatError(f"{file.path.name} holds no {WHOLE}", where=str(file.path))
        if config["num_layers"] != len(layers):
            raise MismatchError(
                f"the adapter is for {config['num_layers']} attention layers, this {type(model).__name__} has {len(layers)}",
                where=str(file.path),
                hint="is it the right base?",
            )
        if config["num_transformer_submodules"] != 1 + two_stacks(model):
            raise MismatchError(
                f"num_transformer_submodules={config['num_transformer_submodules']} fits no {type(model).__name__}",
                where=str(file.path),
                hint="is it the right base?",
            )
        if stuck := stays(model, sites):
            raise MismatchError(
                "in the reference tokens take their positions after the prefix, and this model has no argument position_ids to say so",
                where=f"{stuck} in {type(model).__name__}",
                hint="train a prefix here: st.attach(model, st.PrefixTuning())",
            )
        modules = base_modules(model)
        drop_absent_heads(config, modules)
        places = [Place(path, "attention", "attention", "weight", "prefix_tuning", {"p": p}) for path in layers]
        places += [Place(s.path, "stream", "stream", "weight", "prefix_tuning", {"shift": p}) for s in moved(model, sites)]
        places += other_places(taker, modules, config, set(layers), _NEVER)
        trained = tuple(dict.fromkeys(place.path for place in places if place.method == "dense"))
        where = ("decoder",) if two_stacks(model) else PrefixTuning.where
        self.prepare(places, model)
        return sensible(PrefixTuning(p=p, where=where, train_modules=trained, targets=layers_pattern(layers, model))), places, taker


def layers_pattern(layers: list[str], model: nn.Module) -> str | tuple[str, ...]:
    """Return targets that mean these layers."""
    every = [path for path, m in base_modules(model).items() if kind_known(m).name == "attention layer"]
    return "attention" if two_stacks(model) or layers == every else tuple(layers)


def layers_of(model: nn.Module) -> list[Site]:
    """Return the attention layers to which the reference gives keys and values: those of the text decoder, or of the only stack there is."""
    sites = find_sites(model, PrefixTuning(), "attention")
    if two_stacks(model):
        return [s for s in sites if part_of(model, s) == "decoder"]
    config = model.__dict__.get("config")
    if config is not None and getattr(config, "text_config", None) is not None:
        body = {id(m) for m in model.get_decoder().modules()}  # type: ignore[operator]
        return [s for s in sites if id(s.module) in body]
    return [s for s in sites if not crosses(s)]


def stays(model: nn.Module, sites: list[Site]) -> str:
    """Return the first layer whose tokens have positions that cannot be moved, or ""; relative ones need not be."""
    inside = {id(m) for body in moved(model, sites) for m in body.module.modules()}
    return next((s.path for s in sites if id(s.module) not in inside and not hasattr(type(s.module), "compute_bias")), "")
