"""Targets: from what the user wrote to the modules it means.

A target is one of: a role ("all-linear", "attention", "mlp", "q", "down", "experts", ...); a module-name suffix ("q_proj",
"self_attn.q_proj"); a glob ("*.layers.0.*"); a regex, which must match the full path ("re:..." or anything with regex signs).
A pattern that matches nothing is an error that shows the closest names, unless it starts with "maybe:" and another one matches.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from slimtune.core.errors import SpecError, TargetError, closest
from slimtune.core.kind import Kind
from slimtune.core.site import Site

if TYPE_CHECKING:
    from slimtune.core.spec import Spec

# Last names of modules by what they do in a transformer block. A pattern with a dot is a path suffix; "*" stands for a block's number.
ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "q", "query_proj", "to_q", "wq", "add_q_proj"),
    "k": ("k_proj", "key", "k_lin", "k", "key_proj", "to_k", "wk", "add_k_proj"),
    "v": ("v_proj", "value", "v_lin", "v", "value_proj", "to_v", "wv", "add_v_proj"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense", "attn.c_proj", "self_attention.dense", "attn.Wo",
          "attention.dense", "self_attn.dense", "to_out.0", "to_add_out", "wo_attn"),
    "gate": ("gate_proj", "wi_0", "w1"),
    "up": ("up_proj", "gate_up_proj", "fc1", "c_fc", "intermediate.dense", "lin1", "wi", "wi_1", "w3", "dense_h_to_4h", "mlp.Wi",
           "intermediate_dense", "weights_in", "linear1", "ff.net.0.proj", "ff_context.net.0.proj", "single_transformer_blocks.*.proj_mlp",
           "albert_layers.*.ffn"),
    "down": ("down_proj", "fc2", "mlp.c_proj", "output.dense", "lin2", "DenseReluDense.wo", "w2", "dense_4h_to_h", "mlp.Wo",
             "output_dense", "weights_out", "linear2", "ff.net.2", "ff_context.net.2", "single_transformer_blocks.*.proj_out",
             "albert_layers.*.ffn_output"),
}
GROUPS: dict[str, tuple[str, ...]] = {"attention": ("q", "k", "v", "qkv", "o"), "mlp": ("gate", "up", "down")}
KINDS: dict[str, tuple[str, ...]] = {"all-linear": ("linear", "attention"), "experts": ("experts",), "embedding": ("embedding",),
                                     "conv": ("conv",), "norm": ("norm",),
                                     "attention-layers": ("attention layer", "attention")}
# Output heads of models that do not tell (diffusers, plain PyTorch), by their whole path.
HEADS = ("lm_head", "classifier", "head", "heads", "score", "proj_out", "proj_out_2", "conv_out", "decoder.conv_out")
# Tables that look up something else than tokens (positions, segments, distances): "embedding" does not mean them.
NOT_TOKENS = (
    "position_embeddings", "position_embedding", "embed_positions", "wpe", "token_type_embeddings", "relative_attention_bias", "rel_embeddings",
)  # fmt: skip
MEANING = {
    "q": "query projection", "k": "key projection", "v": "value projection", "qkv": "fused query-key-value projection",
    "o": "output projection of an attention", "gate": "gate of a feed-forward", "up": "first layer of a feed-forward",
    "down": "last layer of a feed-forward", "attention": "attention projection", "mlp": "feed-forward", "head": "output head",
    "all-linear": "linear layer below its head", "experts": "experts", "embedding": "table of token embeddings", "conv": "convolution",
    "norm": "norm", "attention-layers": "attention layer that asks transformers' registry for its function",
}  # fmt: skip
_REGEX = re.compile(r"^\.\*|[\\^$()|+\[\]{}]")  # "layers.0.*" is a glob, ".*q_proj" a regex


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind a module is, the most special first, or None."""
    from slimtune.ports import KINDS as all_kinds

    return next((k for k in all_kinds if k.fits(module)), None)


def heads(model: nn.Module) -> set[str]:
    """Return the paths of output heads: the output embedding, linears beside the body of a transformers model, and what its checkpoint lacked."""
    from slimtune.core.fresh import fresh_modules
    from slimtune.core.placing import base_modules

    modules = base_modules(model)  # what carries a hundred adapters has many more modules
    found: set[str] = set()
    get = getattr(model, "get_output_embeddings", None)
    out = get() if callable(get) else None
    prefix = getattr(model, "base_model_prefix", "")
    body = model._modules.get(prefix) if prefix else None
    for path, module in modules.items():
        if (out is not None and module is out) or (body is not None and path and path.split(".")[0] != prefix):
            found.add(path)
    return fresh_modules(model, modules) | (found or {path for path in modules if any(path == h or path.startswith(f"{h}.") for h in HEADS)})


def candidates(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> dict[str, nn.Module]:
    """Return path -> module of everything a pattern may name: no slots, no parts of modules that are sites as a whole."""
    from slimtune.core.placing import base_modules, kind_at

    found: dict[str, nn.Module] = {}
    closed: list[str] = []
    for path, module in (base_modules(model) if modules is None else modules).items():
        if any(path.startswith(c) for c in closed):
            continue
        found[path] = module
        if kind_at(module).name in {"attention", "experts"}:
            closed.append(f"{path}." if path else "")
    return found


def role_of(path: str) -> str:
    """Return what a linear layer does in its block, by the longest known name its path ends with, or ""."""
    dotted = f".{path}"
    found = [(len(name), role) for role, names in ROLES.items() for name in names if _ends(dotted, name)]
    return max(found)[1] if found else ""


def _ends(dotted: str, name: str) -> bool:
    return fnmatch.fnmatchcase(dotted, f"*.{name}") if "*" in name else dotted.endswith(f".{name}")


def matches(pattern: str, path: str, module: nn.Module, head_paths: set[str]) -> bool:
    """Tell whether one pattern means one module."""
    if pattern in KINDS:
        kind = kind_of(module)
        if kind is None or kind.name not in KINDS[pattern] or path in head_paths:
            return False
        # tables of positions, with a forward of their own or known by name, are not meant
        return pattern != "embedding" or not (kind.problem(module) or path.split(".")[-1] in NOT_TOKENS)
    if pattern == "head":
        return path in head_paths and kind_of(module) is not None
    roles = GROUPS.get(pattern, (pattern,) if pattern in ROLES else ())
    if roles:
        kind = kind_of(module)
        if kind is None or path in head_paths:
            return False
        if pattern == "attention" and kind.name == "attention":
            return True
        return role_of(path) in roles
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    if _REGEX.search(pattern):
        return re.fullmatch(pattern, path) is not None
    if "*" in pattern or "?" in pattern:
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")


def layer_of(path: str) -> tuple[str, int] | None:
    """Return (stack, index) of the block a path lies in: the first number in it."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None


def in_layers(layers: str, stacks: dict[str, int]) -> dict[str, set[int]]:
    """Return, for each stack of blocks, the indices that `layers` means.

    Raises:
        SpecError: it cannot be read, or names a block that does not exist.
    """
    chosen: dict[str, set[int]] = {}
    for stack, length in stacks.items():
        wanted: set[int] = set()
        for part in layers.replace(" ", "").split(","):
            if m := re.fullmatch(r"(last|first):(\d+)", part):
                k = min(int(m[2]), length)
                wanted |= set(range(length - k, length) if m[1] == "last" else range(k))
            elif m := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
                wanted |= set(range(int(m[1]), int(m[2] or m[1]) + 1))
            else:
                raise SpecError(f"cannot read layers={layers!r}", hint='"last:4", "first:2", "0,2-5"')
        chosen[stack] = wanted
    longest = max(stacks.values(), default=0)
    if not any(chosen.values()) or any(max(w) >= longest for w in chosen.values() if w):
        raise TargetError(f"layers={layers!r} names no block", where=f"stacks: {stacks}", hint="blocks count from 0")
    return chosen


def find_modules(
    model: nn.Module, targets: str | Iterable[str], layers: str | None, exclude: str | Iterable[str], usable: object = None
) -> dict[str, nn.Module]:
    """Return path -> module of everything `targets` means.

    Args:
        model: the model.
        targets, layers, exclude: as in `Spec`.
        usable: predicate (module) -> bool that says which modules can carry the op.

    Raises:
        TargetError: nothing matches, or one pattern is dead; the closest names are shown.
    """
    found = candidates(model)
    head_paths = heads(model)
    ok = usable if callable(usable) else (lambda m: True)
    wanted: dict[str, nn.Module] = {}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    first: TargetError | None = None
    for written in patterns:
        pattern = written.removeprefix("maybe:")
        _compiles(pattern)
        named = {p: m for p, m in found.items() if matches(pattern, p, m, head_paths)}
        hits = {p: m for p, m in named.items() if ok(m)}
        if pattern == "all-linear":  # a router among them is left out, and stands in the report; where no layer can be adapted, the reason is said
            hits = {p: m for p, m in hits.items() if not _own_forward(m)} or hits
        if not hits:
            error = dead(pattern, found, named, ok)
            if pattern == written:
                raise error
            first = first or error
        wanted |= hits
    if not wanted and first is not None:
        raise first
    for pattern in [exclude] if isinstance(exclude, str) else list(exclude):
        _compiles(pattern)
        out = [p for p, m in found.items() if matches(pattern, p, m, head_paths)]
        if not out:
            raise dead(pattern, found, {}, ok, role="exclude pattern")
        for path in list(wanted):
            if any(path == o or path.startswith(f"{o}.") for o in out):
                del wanted[path]
    if layers is not None:
        stacks: dict[str, int] = {}
        for path in found:
            if (at := layer_of(path)) is not None:
                stacks[at[0]] = max(stacks.get(at[0], 0), at[1] + 1)
        chosen = in_layers(layers, stacks)
        wanted = {p: m for p, m in wanted.items() if (at := layer_of(p)) is not None and at[1] in chosen[at[0]]}
        for pattern in patterns if wanted else []:
            left = [p for p, m in found.items() if matches(pattern, p, m, head_paths) and ok(m)]
            if left and not any(layer_of(p) for p in left):
                raise TargetError(
                    f"target {pattern!r} lies in no block, so layers={layers!r} would leave it out",
                    where=", ".join(left[:4]),
                    hint=f"st.Union(of=[st.LoRA(targets=..., layers={layers!r}), st.LoRA(targets={pattern!r})]), or take it out of targets=",
                )
    if not wanted:
        raise TargetError("after layers= and exclude= no module is left", where=f"targets={targets!r}", hint="loosen one of them")
    order = {path: i for i, path in enumerate(found)}
    return dict(sorted(wanted.items(), key=lambda item: order[item[0]]))


def _own_forward(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.name == "linear" and bool(kind.problem(module))


def _compiles(pattern: str) -> None:
    try:
        re.compile(pattern[3:] if pattern.startswith("re:") else pattern if _REGEX.search(pattern) else "")
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a valid regex: {error}", hint='"re:.*q_proj"') from None


def dead(pattern: str, found: dict[str, nn.Module], named: dict[str, nn.Module], ok: object, role: str = "target") -> TargetError:
    """Return the error for a pattern that matches nothing usable."""
    model = type(found[""]).__name__
    if named:
        path, module = next(iter(named.items()))
        block = kind_of(module).name == "module"  # type: ignore[union-attr]
        return TargetError(
            f"{role} {pattern!r} names only modules that cannot carry this op: {_why_not(module)}",
            where=f"{path or '(the model)'} ({type(module).__name__})",
            hint=("name the linear layers inside it" if block else "name other modules") + _usable_names(found, ok),
        )
    where = f"{model}, {len(found)} modules"
    if pattern in MEANING:
        reason = f"this {model} has no {MEANING[pattern]}" + ("" if pattern in KINDS else " known by its name")
        return TargetError(f"{role} {pattern!r} matches no module: {reason}", where=where, hint="name modules themselves" + _usable_names(found, ok))
    names = {".".join([q for q in p.split(".") if not q.isdigit()][-1:]) for p in found if p} - {""}
    words = [*sorted(names), *ROLES, *GROUPS, *KINDS]
    return TargetError(f"{role} {pattern!r} matches no module", where=where, hint=f"closest: {closest(pattern, words)}" + _usable_names(found, ok))


def _why_not(module: nn.Module) -> str:
    kind = kind_of(module)
    assert kind is not None, "BlockKind fits every module"
    if kind.params and not kind.names(module):
        return f"a {type(module).__name__} without a weight of its own"
    return f"{kind.noun} takes {' and '.join(kind.ports)} ops only"


def _usable_names(found: dict[str, nn.Module], ok: object) -> str:
    names = sorted({p.split(".")[-1] for p, m in found.items() if p and callable(ok) and ok(m)})[:16]
    return f"; this model has: {', '.join(names)}" if names else ""


def find_sites(model: nn.Module, spec: Spec, port: str) -> list[Site]:
    """Return the sites of `spec.targets` at one port, every weight of every module that matches.

    Raises:
        TargetError: see `find_modules`.
    """

    def usable(module: nn.Module) -> bool:
        kind = kind_of(module)
        return kind is not None and port in kind.ports and (port != "weight" or bool(kind.names(module)))

    written = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    if port == "attention":  # there the role means the layer itself, not the projections inside it
        written = tuple("attention-layers" if t == "attention" else t for t in written)
    sites = []
    for path, module in find_modules(model, written, spec.layers, spec.exclude, usable).items():
        kind = kind_of(module)
        assert kind is not None
        for param in kind.names(module) if port == "weight" else kind.names(module)[:1] or ("weight",):
            shape = kind.shape(module, param) if kind.names(module) else ()
            sites.append(Site(path=path, port=port, kind=kind, module=module, param=param, shape=shape))
    return sites
