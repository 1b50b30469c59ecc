"""Trainable tokens in the reference's layout: X.trainable_tokens_delta [k, d], the new rows themselves, in the order of `token_indices`.

A head tied to the table (by its config, `tie_word_embeddings`) is not named: it follows. As an option of a LoRA (`trainable_token_indices`) the
same stands at X.token_adapter.trainable_tokens_delta; see `lora`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import FormatError
from slimtune.core.kind import Kind
from slimtune.core.op import Op
from slimtune.core.placing import base_modules
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter
from slimtune.files.layouts.base import Codec, Place, Taker, dotted
from slimtune.files.layouts.config import FLAG, Fields, targets
from slimtune.files.layouts.modular import ModularLayout
from slimtune.files.layouts.patterns import to_targets
from slimtune.files.layouts.reading import kind_known, module_named, where_to
from slimtune.methods.trainable_tokens import TABLES, TokenRowsOp, TrainableTokens, input_table, tied_with, token_problems

DELTA = "trainable_tokens_delta"
INSIDE = "token_adapter"  # a LoRA's table of tokens is wrapped once more


class TokensCodec(Codec):
    """The rows of one table, for all that is tied to it."""

    def __init__(self, inside: str = "") -> None:
        self.inside = inside

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        found = super().take(place, op, module, kind, file)
        rows, tokens = found.get("rows"), place.settings["tokens"]
        if rows is not None and rows.shape[0] == len(tokens):
            found["rows"] = rows[sorted(range(len(tokens)), key=lambda i: tokens[i])]
        return found

    def name(self, place: Place, tensor: str) -> str:
        return dotted(place.path, self.inside, DELTA)


def is_tokens(v: Any) -> bool:
    return isinstance(v, list) and bool(v) and not token_problems(v)


class TokensLayout(ModularLayout):
    """peft_type TRAINABLE_TOKENS."""

    peft_type = "TRAINABLE_TOKENS"
    methods = ("trainable_tokens",)
    kinds = ("embedding", "linear")
    key = re.compile(r"(?P<path>.*?)\.?(?P<tensor>trainable_tokens_delta)")
    fields = Fields(
        {"init_weights": True, "target_modules": None, "token_indices": []},
        types={
            **{k: v for k, v in targets().items() if k == "target_modules"},
            "token_indices": ("a list of different token numbers", is_tokens),
            "init_weights": FLAG,
        },
    )

    def op_codec(self, method: str) -> Codec:
        return TokensCodec()

    def unfit(self, adapter: Adapter, ops: dict[str, Op]) -> str:
        if len({tuple(op.rows.ids.tolist()) for op in ops.values() if isinstance(op, TokenRowsOp)}) != 1:
            return "its tables train different tokens"
        return ""

    def problem(self, adapter: Adapter, model: nn.Module) -> str:
        return super().problem(adapter, model) or untied(self.own(adapter), model)

    def where(self, wanted: Any, paths: Any) -> dict[str, Any]:
        return {}

    def options(self, adapter: Adapter, model: nn.Module, ops: dict[str, Op]) -> dict[str, Any]:
        tokens = tokens_of(ops)
        return {"token_indices": next(iter(tokens.values())), **to_targets(set(tokens), list(base_modules(model)), layers=False)}

    def places(self, taker: Taker, modules: dict[str, nn.Module], config: dict[str, Any]) -> list[Place]:
        heads = dict.fromkeys(found["path"] for name in taker.left if (found := self.key.fullmatch(name)))
        return token_places(dict.fromkeys(heads, config["token_indices"]), modules, taker)

    def recipe(self, config: dict[str, Any], places: list[Place], model: nn.Module) -> Spec:
        where = where_to(config) if config["target_modules"] else {}
        return TrainableTokens(tokens=tuple(sorted(config["token_indices"])), **where)


def tokens_of(ops: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return path of a table -> its tokens, without what is tied to another."""
    return {path: op.rows.ids.tolist() for path, op in ops.items() if op.rows.path == path}


def untied(ops: Mapping[str, Any], model: nn.Module) -> str:
    """Return why the reference would not train all that is tied to a table, or ""."""
    tied = [path for path, op in ops.items() if op.rows.path != path]
    config = model.__dict__.get("config")
    if not tied:
        return ""
    if config is None or not config.tie_word_embeddings or any(model.get_submodule(op.rows.path) is not input_table(model) for op in ops.values()):
        return "the reference does not know that its tables are tied"
    biased = any(model.get_submodule(path)._parameters.get("bias") is not None for path in tied)
    return "the reference drops the bias of a tied head" if biased else ""


def token_places(tokens: dict[str, list[int]], modules: dict[str, nn.Module], taker: Taker, inside: str = "") -> list[Place]:
    """Return the places of a file's tables, and of all that is tied to them; what the file says twice of tied ones is said once.

    Args:
        tokens: path -> tokens, in the order of the file's rows.
        inside: see `TokensCodec`.

    Raises:
        FormatError, MismatchError: one is no table of tokens.
    """
    places: dict[str, Place] = {}
    owner: dict[str, str] = {}
    order = {path: i for i, path in enumerate(modules)}
    for path, ids in sorted(tokens.items(), key=lambda item: order.get(item[0], 0)):
        module = module_named(path, modules, taker.file)
        if path in owner:  # tied to one before
            mine, first = (dotted(p, inside, DELTA) for p in (path, owner[path]))
            if mine in taker and not (tokens[owner[path]] == ids and first in taker and torch.equal(taker.look(mine), taker.look(first))):
                what = f"the file has other rows for {path} than for {owner[path]}, and here the two are one table"
                raise FormatError(what, where=str(taker.file.path), hint="is it the right base?")
            if mine in taker:
                taker.take(mine)
            continue
        kind = kind_known(module)
        if kind.name not in TABLES:
            raise FormatError(f"a {type(module).__name__} has no rows for tokens", where=path, hint="is it the right base?")
        size = max(kind.shape(module, "weight")[0], max(ids) + 1)
        settings = {"tokens": ids, "size": size}
        for p in (path, *tied_with(modules[""], module)):
            owner[p] = path
            places.setdefault(p, Place(p, "weight", "weight", "weight", "trainable_tokens", settings))
    return list(places.values())


def named_tables(value: Any, modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Return path -> tokens for the value of `trainable_token_indices`."""
    if isinstance(value, list):
        table = input_table(modules[""])
        path = next((p for p, m in modules.items() if m is table), "embed_tokens")
        return {path: value}
    found: dict[str, list[int]] = {}
    for name, ids in value.items():
        paths = [p for p in modules if p.endswith(name)]
        found |= dict.fromkeys(paths or [name], ids)
    return found


