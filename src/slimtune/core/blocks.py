"""Sub-blocks: where the attentions and feed-forwards of a transformer begin and end.

A sub-block is what a layer adds to its residual stream. Its end is the module whose output that is, before the addition: the last projection
of an attention (role "o"), the last layer of a feed-forward (role "down"), the whole module of a mixture of experts or of
`nn.MultiheadAttention`. Its entrance is a module that is given the sub-block's input: the query projection, the first layer. Often the two
are one module's children (Llama's mlp), often not (BERT's intermediate.dense and output.dense, BART's fc1 and fc2 in the layer itself), and
the module around them may add the residual already (BLOOM's mlp), so the ends count and not what stands around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from slimtune.core.targets import candidates, heads, kind_of, role_of

ENDS = {"o": "attention", "down": "feed-forward"}  # role of the last layer -> sub-block
_STARTS = {"o": ("q", "qkv"), "down": ("gate", "up")}  # roles of the layer that is given the input, best first
_LATENT = ("q_a_proj",)  # queries made through a narrow layer begin there
LAYER = "whole-layer"


@dataclass(frozen=True)
class SubBlock:
    """One attention or feed-forward.

    Attributes:
        role: "o" (attention) or "down" (feed-forward).
        end: path of the module whose output is the sub-block's.
        entrance: path of a module that gets the sub-block's input; `end` itself where that one holds the whole sub-block; "" if unknown.
    """

    role: str
    end: str
    entrance: str


def sub_blocks(model: nn.Module) -> list[SubBlock]:
    """Return the sub-blocks of a model in the order of its modules; none for a model whose layers have no known names."""
    found, head_paths = candidates(model), heads(model)
    kinds = {path: kind_of(module) for path, module in found.items()}
    names = {path: kind.name for path, kind in kinds.items() if kind is not None}
    roles = {path: role_of(path) for path in found if names[path] in {"linear", "conv"} and path not in head_paths}
    sparse = list(dict.fromkeys(_holder(path, roles) for path in found if names[path] == "experts" or ".experts." in f".{path}."))
    blocks: list[SubBlock] = []
    ends = {role: [p for p, r in roles.items() if r == role and not _inside(p, sparse)] for role in ENDS}
    for path in found:
        if path in sparse:
            blocks.append(SubBlock("down", path, path))
        elif names[path] == "attention":
            blocks.append(SubBlock("o", path, path))
        elif (role := roles.get(path, "")) in ENDS and path in ends[role]:
            blocks.append(SubBlock(role, path, _entrance(path, role, roles, ends[role])))
    return blocks


def layers_of(blocks: list[SubBlock]) -> list[str]:
    """Return the paths of the layers around sub-blocks: the innermost numbered modules that hold an attention and a feed-forward."""
    found: dict[str, None] = {}
    for block in blocks:
        for path in _numbered(block.end):
            if {b.role for b in blocks if _inside(b.end, [path])} == set(ENDS):
                found[path] = None
                break
    return list(found)


def resolve(model: nn.Module, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return targets with "o", "down" and "whole-layer" spelt out as the ends of the model's sub-blocks, where it has any.

    Args:
        targets: as in `Spec`; other words pass through.
    """
    blocks = sub_blocks(model)
    out: list[str] = []
    for written in (targets,) if isinstance(targets, str) else targets:
        word = written.removeprefix("maybe:")
        paths = layers_of(blocks) if word == LAYER else [b.end for b in blocks if b.role == word]
        out += [f"re:{re.escape(path)}" for path in paths] or [written]
    return tuple(dict.fromkeys(out))


def _holder(path: str, roles: dict[str, str]) -> str:
    """Return the module around experts: router, experts and whatever they share; the experts themselves if it is the layer already."""
    parts = path.split(".")
    at = parts.index("experts") if "experts" in parts else len(parts) - 1
    around = ".".join(parts[:at])
    if not around or any(role == "o" and _inside(p, [around]) for p, role in roles.items()):
        return ".".join(parts[: at + 1])
    return around


def _numbered(path: str) -> Iterator[str]:
    """Yield the modules around a path whose name is a number, the innermost first."""
    parts = path.split(".")
    for i in reversed(range(len(parts))):
        if parts[i].isdigit():
            yield ".".join(parts[: i + 1])


def _inside(path: str, outer: Iterable[str]) -> bool:
    return any(path == o or path.startswith(f"{o}.") for o in outer)


def _entrance(end: str, role: str, roles: dict[str, str], ends: list[str]) -> str:
    """Return the layer that gets the input of the sub-block which `end` closes: the nearest of its role, with no other end as near."""
    for wanted in _STARTS[role]:
        near = [p for p, r in roles.items() if (r == wanted or (wanted == "q" and p.endswith(_LATENT))) and _added(p) == _added(end)]
        best = max(near, key=lambda p: len(_common(p, end)), default="")
        around = ".".join(_common(best, end))
        if best and around and [e for e in ends if _inside(e, [around]) and _added(e) == _added(end)] == [end]:
            return best
    return ""


def _common(a: str, b: str) -> list[str]:
    """Return the leading parts that two paths share."""
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return shared


def _added(path: str) -> bool:
    """Tell whether a projection serves the second stream of a joint attention (diffusers)."""
    return path.rpartition(".")[2].startswith(("add_", "to_add"))
