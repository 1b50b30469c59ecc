"""Trainable tokens: W' = W + E D, E [v, k] the columns of the identity that stand for k chosen tokens, D [k, d] trained, zero at the start.

Only the rows of these tokens train, in the table of the input tokens and in every weight tied to it (the output head of most models), from one
D for all of them. The dense [v, d] delta is never formed: the table adds D's rows where their tokens stand, the head adds x D^T at their
logits. With `st.add_tokens`, or `add_tokens: ["<call>"]` in the recipe of any method, it teaches new tokens without training, or saving, the
rest of the table.

Source: the reference library's TRAINABLE_TOKENS, which keeps the new rows where this keeps their difference. Files hold the new rows.
Cost: k d parameters, n d products at the table, n k d at a tied head. Merges into the weights.
Choose it when a model must learn new tokens, or a new meaning of a few old ones; beside a LoRA (`st.Union`) if it must learn more than these.
Cannot: sit on convolutions, norms, experts or attention projections. New tokens of a model whose head is not tied get logits of their own
only with `head="train"`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import MismatchError, SpecError
from slimtune.core.op import Additive, cast
from slimtune.core.placing import base_modules, kind_at
from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter

TABLES = {"embedding", "linear"}
SPECIAL = ("bos", "eos", "unk", "sep", "cls", "mask", "decoder_start")  # not pad: nobody looks at it


class Rows(nn.Module):
    """What tied ops share: the tokens, ascending, and D [k, d]."""

    ids: Tensor

    def __init__(self, tokens: tuple[int, ...], width: int, site: Site) -> None:
        super().__init__()
        self.path = site.path  # of the op whose tensors stand for all of them in a file
        self.register_buffer("ids", torch.tensor(tokens, dtype=torch.long, device=site.device), persistent=False)
        self.D = nn.Parameter(torch.zeros(len(tokens), width, device=site.device, dtype=site.dtype))


class TokenRowsOp(Additive):
    """D [k, d] on the rows `ids` of a table [v, d], or of a head with weight [v, d]."""

    roles = {"D": "dense"}
    linear_in = {"D": 0.0}

    def __init__(self, site: Site, tokens: tuple[int, ...]) -> None:
        super().__init__(site)
        self.path = site.path
        self._tie(site, tokens)

    def _tie(self, site: Site, tokens: tuple[int, ...]) -> None:
        """Take the rows of the ops tied to this one, or make them."""
        key = f"rows {id(site.module._parameters.get(site.param))} {tokens}"
        if key not in site.shared:
            site.shared[key] = Rows(tokens, self.shape[1], site)
        self.rows: Rows = site.shared[key]

    @property
    def D(self) -> nn.Parameter:
        return self.rows.D

    @property
    def tied(self) -> object:
        """What ops on weights tied to each other have in common if they do the same to them."""
        return self.rows

    def add(self, x: Tensor, y: Tensor, host: nn.Module, w: Tensor | None) -> Tensor:
        D = cast(self.D, y)
        return self.kind.add_rows(x, y, self.rows.ids, D if w is None else (w * D).to(y.dtype), host)

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return self.kind.add_rows(x, torch.zeros_like(y), self.rows.ids, cast(self.D, y), host)

    def weight(self, W: Tensor) -> Tensor:
        return W.index_add(0, self.rows.ids.to(W.device), self.D.to(device=W.device, dtype=W.dtype))

    def delta(self) -> Tensor:
        return self.D.new_zeros(self.shape).index_add(0, self.rows.ids, self.D)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        k, (v, d) = len(self.rows.ids), self.shape
        if 2 * k > min(v, d):
            return None
        E = torch.zeros(k, v, device=self.D.device, dtype=self.D.dtype)
        E[torch.arange(k, device=E.device), self.rows.ids] = 1.0
        return (E, self.D.T) if self.kind.out_axis else (self.D, E.T)  # [k, v] and [d, k] of a table; [k, d] and [v, k] of a head

    # ---- files: the new rows of the table themselves, so that they fit a table whose new rows start at random -------
    def settings(self) -> dict[str, Any]:
        return {"tokens": self.rows.ids.tolist(), "size": self.shape[0]}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        tokens = settings.get("tokens")
        if not isinstance(tokens, (list, tuple)) or set(settings) - {"tokens", "size"} or (wrong := token_problems(tokens, self.shape[0])):
            raise SpecError(f"these are no settings of trainable tokens here: {str(settings)[:200]}", where=str(site), hint="; ".join(wrong[:2]))
        self._tie(site, tuple(sorted(tokens)))

    def export(self, module: nn.Module) -> dict[str, Tensor]:
        return {"rows": self._base(module) + self.D.detach()} if self.rows.path == self.path else {}

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"rows": tuple(self.D.shape)} if self.rows.path == self.path else {}

    def reset_from(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        from slimtune.methods.dense import minus

        if self.rows.path == self.path:
            with torch.no_grad():
                self.D.copy_(minus(tensors["rows"].to(self.D.device), self._base(module), self.D.dtype))

    def _base(self, module: nn.Module) -> Tensor:
        W = self.kind.read(module, self.param).detach()
        return W.index_select(0, self.rows.ids.to(W.device)).to(device=self.D.device, dtype=self.D.dtype)


def token_problems(tokens: Iterable[Any], size: int | None = None) -> list[str]:
    """Return what is wrong with token numbers, by themselves and, if `size` is given, for a table of that many rows."""
    tokens = list(tokens)
    odd = [t for t in tokens if type(t) is not int or t < 0]
    if odd:
        return [f"tokens are whole numbers from 0, not {odd[0]!r}"]
    wrong = [] if tokens else ["tokens names none"]
    if len(set(tokens)) != len(tokens):
        wrong.append(f"token {next(t for t in tokens if tokens.count(t) > 1)} is named twice")
    if size is not None and tokens and max(tokens) >= size:
        more = f"st.add_tokens, or model.resize_token_embeddings({max(tokens) + 1}), comes first"
        wrong.append(f"token {max(tokens)} lies beyond the {size} rows: {more}")
    return wrong


@dataclass(frozen=True)
class TokenSite(Site):
    """A site and its tokens."""

    tokens: tuple[int, ...] = ()


@register("trainable_tokens")
@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Spec):
    """Train the rows of chosen tokens, in the table and in the head tied to it.

    Args:
        tokens: their numbers; default: the special tokens that the model's config names (bos, eos, sep, ...), or all rows of a table whose
            model names none. `st.add_tokens` returns a spec with new ones.
        head: of a model whose head is not tied to the table: "tied": the head stays as it is; "train": it gets rows of its own.
        targets: default: the table of input tokens.

    Example:
        >>> import slimtune as st
        >>> st.TrainableTokens(tokens=(32000, 32001)).tokens
        (32000, 32001)
    """

    targets: str | tuple[str, ...] = ()
    tokens: tuple[int, ...] | None = None
    head: str = "tied"

    def problems(self) -> list[str]:
        wrong = [] if self.head in {"tied", "train"} else [f'head must be "tied" or "train", not {self.head!r}']
        return wrong + ([] if self.tokens is None else token_problems(self.tokens))

    def sites(self, model: nn.Module) -> list[Site]:
        found: list[Site] = []
        if self.targets:
            found = super().sites(model)
        else:
            tables = [input_table(model), *([output_head(model)] if self.head == "train" else [])]
            modules = {id(m): path for path, m in base_modules(model).items()}
            found = [site_of(modules[id(m)], m) for m in tables if m is not None and id(m) in modules]
        if not found:
            found = replace(self, targets="embedding").sites(model)  # plain modules: every table; none is an error that says so
        known = {s.path for s in found}
        found += [site_of(path, m) for s in list(found) for path, m in tied_with(model, s.module).items() if path not in known]
        found = list({s.path: s for s in found}.values())
        return [TokenSite(s.path, s.port, s.kind, s.module, s.param, s.shape, tokens=self._tokens(model, s)) for s in found]

    def _tokens(self, model: nn.Module, site: Site) -> tuple[int, ...]:
        if self.tokens is not None:
            return tuple(sorted(self.tokens))
        rows = site.shape[0] if site.shape else 0
        return special_tokens(model, rows) or tuple(range(rows))

    def check(self, site: Site) -> list[str]:
        if site.kind.name not in TABLES:
            return [f"the rows of {site.kind.noun} are no tokens"]
        return token_problems(self.tokens or (), site.shape[0]) if self.tokens else []

    def build(self, site: Site) -> TokenRowsOp:
        return TokenRowsOp(site, site.tokens if isinstance(site, TokenSite) else tuple(sorted(self.tokens or (0,))))

    def remarks(self, adapter: Adapter) -> list[str]:
        """Return what a report should say about the tokens."""
        ids = next((op.rows.ids for op in adapter.ops.values() if isinstance(op, TokenRowsOp)), None)
        tokens: list[int] = [] if ids is None or type(ids) is not Tensor or ids.device.type == "meta" else ids.tolist()
        shown = ", ".join(map(str, tokens[:12])) + (", ..." if len(tokens) > 12 else "")
        return [f"the rows of {len(tokens)} token(s) train: {shown}"] if tokens else []

    def before_load(self, model: nn.Module, settings: dict[str, dict[str, Any]]) -> None:
        """Raise if the file's tokens lie beyond the vocabulary of this base.

        Args:
            settings: path -> settings of the op there.

        Raises:
            MismatchError: with what to call.
        """
        modules = base_modules(model)
        for path, held in settings.items():
            size, module = held.get("size"), modules.get(path)
            rows = kind_at(module).shape(module, "weight")[0] if module is not None and kind_at(module).name in TABLES else None
            if rows is not None and isinstance(size, int) and max(held.get("tokens") or [0]) >= rows:
                new = sum(t >= rows for t in held["tokens"])
                raise MismatchError(
                    f"the adapter was trained with {new} token(s) beyond this vocabulary: {size} rows there, {rows} here",
                    where=f"{path} ({type(module).__name__})",
                    hint=f"model.resize_token_embeddings({size}) on the bare base, then st.load(...); their rows are in the file",
                )


def site_of(path: str, module: nn.Module) -> Site:
    kind = kind_at(module)
    return Site(path=path, port="weight", kind=kind, module=module, param="weight", shape=kind.shape(module, "weight") if kind.params else ())


def input_table(model: nn.Module) -> nn.Module | None:
    """Return a transformers model's table of input tokens."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # a model of images or sounds
        return None
    return found if isinstance(found, nn.Module) and kind_at(found).name == "embedding" else None


def output_head(model: nn.Module) -> nn.Module | None:
    """Return a transformers model's output head."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return found if isinstance(found, nn.Module) else None


def tied_with(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of every other table or head that has the very weight of this one."""
    weight = module._parameters.get("weight")
    same = {p: m for p, m in base_modules(model).items() if m is not module and weight is not None and m._parameters.get("weight") is weight}
    return {p: m for p, m in same.items() if kind_at(m).name in TABLES}


def special_tokens(model: nn.Module, rows: int) -> tuple[int, ...]:
    """Return the special tokens that a model's config names and its table has."""
    config = model.__dict__.get("config")
    found: set[int] = set()
    for name in SPECIAL:
        value = getattr(config, f"{name}_token_id", None)
        found |= {t for t in (value if isinstance(value, (list, tuple)) else [value]) if type(t) is int and 0 <= t < rows}
    return tuple(sorted(found))
