"""How the tensors of LoRA's kin stand in a file of the reference.

    linear, Conv1D     X.lora_A.weight [r, a]             X.lora_B.weight [b, r]       X.lora_B.bias [b]
    convolution        X.lora_A.weight [r, a, *k]         X.lora_B.weight [b, r/g, 1..]
    embedding          X.lora_embedding_A [r, num]        X.lora_embedding_B [dim, r]
    MultiheadAttention X.lora_A/B.weight (in_proj)        X.base_layer.out_proj.lora_A/B.weight
                       (out_proj counts twice: see `TWICE`)
    experts            X.lora_A.weight [E r, a], rows expert by expert
                       X.lora_B.weight [b, r E], columns rank by rank; the last adapted parameter of a module stands at X, the one
                       before at X.base_layer, and so on
    with a magnitude   X.lora_magnitude_vector [b], [1, b, 1, ...] of a convolution: a `DoRA` of a LoRA
    pooled inputs      X.lora_A.weight [r, a/g] (use_qalora): read as `QALoRA`; written in our own layout, since the reference
                       pools on GPTQ layers only, and elsewhere takes such a file for a plain LoRA of other shapes

A LoRA with a frozen start is written as a plain one of rank 2 r: [A; A0] and [B, -B0] with the same s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.kind import Kind
from slimtune.files.layouts.base import Codec, Place, Taker, dotted

# Up to this version the reference adds the delta of an attention module's output projection twice (its pull request 3774), in training as well.
# So this is what its files mean; ours hold half of B there, to mean the same.
TWICE = (0, 21, 2)


class LoRACodec(Codec):
    """Names and shapes of one LoRA op."""

    def __init__(self, depth: dict[tuple[str, str], int], twice: bool = True) -> None:
        self.depth = depth  # (path, param) of experts -> how many levels below X it stands
        self.twice = twice  # whether out_proj of an attention module counts twice

    def names(self, place: Place, kind: Kind) -> tuple[str, str, str]:
        """Return the names of A, B and B's bias."""
        if kind.name == "embedding":
            return dotted(place.path, "lora_embedding_A"), dotted(place.path, "lora_embedding_B"), dotted(place.path, "lora_B.bias")
        below = ""
        if place.param == "out_proj":
            below = "base_layer.out_proj"
        elif kind.name == "attention" and place.param != "in_proj_weight":
            below = place.param  # the reference has no separate projections: a name of our own
        elif kind.name == "experts":
            below = ".".join(["base_layer"] * self.depth[place.path, place.param])
        at = dotted(place.path, below)
        return dotted(at, "lora_A.weight"), dotted(at, "lora_B.weight"), dotted(at, "lora_B.bias")

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        a, b, bias = self.names(place, kind)
        with torch.no_grad():
            A, B = op.factors()
            if kind.name == "experts":
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)  # [E, r, a] -> [E r, a];  [E, b, r] -> [b, r E]
            elif kind.name == "conv" and A.shape[1] != module.in_channels:
                A = kind.widen(A, module.groups)  # type: ignore[attr-defined]
            elif place.param == "out_proj" and self.twice:
                B = B / 2
        return {a: A, b: B} | ({} if op.up_bias is None else {bias: op.up_bias})

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        a, b, bias = self.names(place, kind)
        A, B = file.take(a), file.take(b)
        out: dict[str, Tensor | None] = {} if op.up_bias is None else {"up_bias": file.take(bias)}
        if A is None or B is None:
            return out | {"A": A, "B": B}
        if kind.name == "experts":
            E = op.shape[0]
            if A.dim() == B.dim() == 2 and A.shape[0] % E == B.shape[1] % E == 0:
                A, B = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
        elif kind.name == "conv" and A.dim() == B.dim() and A.shape[0] == B.shape[1] * module.groups:  # type: ignore[operator]
            A = kind.adopt(A, B)
        elif place.param == "out_proj" and self.twice:
            B = B * 2
        if op.A0 is None:
            return out | {"A": A, "B": B}
        return out | _split(A, B, experts=kind.name == "experts")


def _split(A: Tensor, B: Tensor, experts: bool) -> dict[str, Tensor | None]:
    """Undo `Kind.beside`: the trained factors and the frozen ones."""
    if experts:
        (A, A0), (B, B0) = A.chunk(2, 1), B.chunk(2, 2)
    else:
        g = max(A.shape[0] // max(B.shape[1], 1), 1)
        (A, A0), (B, B0) = (t.flatten(0, 1) for t in A.reshape(g, A.shape[0] // g, *A.shape[1:]).chunk(2, 1)), B.chunk(2, 1)
    return {"A": A, "B": B, "A0": A0, "B0": -B0}


class DoRACodec(LoRACodec):
    """Names and shapes of a LoRA with a magnitude."""

    def magnitude(self, place: Place) -> str:
        return dotted(place.path, "lora_magnitude_vector")

    def put(self, place: Place, op: Any, module: nn.Module, kind: Kind) -> dict[str, Tensor]:
        m = op.m.detach()
        return {**super().put(place, op.inner, module, kind), self.magnitude(place): kind.along_output(m, m)[None] if kind.name == "conv" else m}

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        inner = {f"inner.{k}": v for k, v in super().take(place, op.inner, module, kind, file).items()}
        m = file.take(self.magnitude(place))
        return {**inner, "m": m.flatten() if m is not None and m.dim() > 1 and m.numel() == max(m.shape) else m}


class QALoRACodec(LoRACodec):
    """Names of a QA-LoRA's factors; only ever read."""

    def take(self, place: Place, op: Any, module: nn.Module, kind: Kind, file: Taker) -> dict[str, Tensor | None]:
        a, b, _ = self.names(place, kind)
        return {"A": file.take(a), "B": file.take(b)}


CODECS = {"lora": LoRACodec, "dora": DoRACodec, "qa_lora": QALoRACodec}
