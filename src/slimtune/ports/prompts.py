"""What the prompt methods share: where their virtual tokens go, how they start, and the options that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimtune.core.errors import SpecError, TargetError
from slimtune.core.op import Op
from slimtune.core.site import Site
from slimtune.core.spec import Spec
from slimtune.ports.body import embeddings_of
from slimtune.ports.stream import AUTO, BodyKind, ReaderOp, StreamOp, room_problems, stream_problems, stream_sites, width_of

INITS = ("random", "like_tokens", "vocab", "text")


class PromptOp(StreamOp):
    """A stream op with p virtual tokens of width d."""

    def __init__(self, site: Site, tokens: int, keep: bool) -> None:
        super().__init__(site)
        self.tokens, self.keep, self.where = tokens, keep, str(site)

    def settings(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "keep": self.keep}

    def resume(self, settings: dict[str, Any], site: Site) -> None:
        tokens, keep = settings.get("tokens"), settings.get("keep")
        if tokens != self.tokens or type(tokens) is not int or type(keep) is not bool or len(settings) != 2:
            raise SpecError(f"these are no settings of {self.tokens} virtual tokens: {str(settings)[:200]}", where=str(site))
        self.keep = keep


@dataclass(frozen=True, kw_only=True)
class PromptSpec(Spec):
    """Base of the methods with virtual tokens.

    Args:
        targets: "auto": in front of every body of a transformers model (in an encoder-decoder: of the encoder's); or the name of a module.
        tokens: p, how many virtual tokens.
        keep: leave them in the body's output, for heads that read the first place: these then read the first virtual token, not the
            first real one. The output gets p places longer, so it suits classification of whole sequences only.
        decoder: in an encoder-decoder, p more of their own in front of the decoder's tokens.
        width: d of a module's input, where it is no body of a transformers model.
        seed: of the random start.
    """

    port = "stream"

    targets: str | tuple[str, ...] = AUTO
    tokens: int = 20
    keep: bool = False
    decoder: bool = False
    width: int | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        wrong = []
        if not 1 <= self.tokens < 2**16:
            wrong.append(f"tokens must be from 1 to 65535, not {self.tokens}")
        if self.layers is not None:
            wrong.append("layers= has no meaning here: virtual tokens stand in front of all blocks")
        if self.width is not None and self.width < 1:
            wrong.append(f"width must be at least 1, not {self.width}")
        return wrong

    def sites(self, model: Any) -> list[Site]:
        found = stream_sites(model, self)
        readers = [site for site in found if site.port == "reader"]
        if self.decoder and not readers:
            raise TargetError("decoder=True finds no decoder that reads an encoder", where=type(model).__name__, hint="leave decoder= out")
        return found + [replace(site, port="stream") for site in readers if self.decoder]

    def check(self, site: Site) -> list[str]:
        return stream_problems(site, self.width) + (room_problems(site, self.tokens) if site.port == "stream" else [])

    def prepare(self, sites: list[Site], shared: dict[str, Any]) -> None:
        shared["readers"] = {site.path for site in sites if site.port == "reader"}

    def build(self, site: Site) -> Op:
        if site.port == "reader":
            return ReaderOp(site, self.tokens)
        readers = site.shared.get("readers", ())
        return self.prompt(site, site.path not in readers and (self.keep or bool(readers)))

    def prompt(self, site: Site, keep: bool) -> PromptOp:
        """Return the op of a body."""
        raise NotImplementedError

    def expected_start(self, model: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return what a model must give right after attaching, with the virtual tokens put in by hand."""
        from slimtune.core.attach import attach, disabled
        from slimtune.testing.by_hand import whole_model

        attach(model, self)
        with disabled(model), torch.no_grad():
            return whole_model(model, inputs)


@dataclass(frozen=True, kw_only=True)
class StartedPromptSpec(PromptSpec):
    """Base of those whose virtual tokens have a start that can be chosen.

    Args:
        init: "random" (N(0, 1), as the reference library starts), "like_tokens" (normal, centred and as spread as the token embeddings),
            "vocab" (random rows of these), "text" (the rows of a text).
        init_text: for init="text": a text, with `tokenizer`; or token ids. A short one is repeated, a long one cut.
        tokenizer: folder or name of the tokenizer that reads init_text.
    """

    init: str = "random"
    init_text: str | tuple[int, ...] | None = None
    tokenizer: str | None = None

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.init not in INITS:
            wrong.append(f"init must be one of {', '.join(INITS)}, not {self.init!r}")
        if self.init != "text":
            if self.init_text is not None or self.tokenizer is not None:
                wrong.append('init_text= and tokenizer= belong to init="text"')
        elif not self.init_text:
            wrong.append('init="text" needs init_text=, a text or token ids')
        elif isinstance(self.init_text, str):
            if not self.tokenizer:
                wrong.append("a text in init_text= needs tokenizer=, the folder of the model's tokenizer")
        elif not all(type(i) is int and i >= 0 for i in self.init_text):
            wrong.append("init_text= must be a text or token ids")
        return wrong

    def check(self, site: Site) -> list[str]:
        wrong = super().check(site)
        if not wrong and site.port == "stream" and self.init in {"vocab", "text"} and not isinstance(site.kind, BodyKind):
            wrong.append(f"init={self.init!r} needs token embeddings, which {type(site.module).__name__} has none of")
        return wrong

    def start(self, site: Site) -> Tensor:
        """Return the virtual tokens to start from [p, d]."""
        d = width_of(site, self.width)
        new: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
        if site.blank:
            return torch.empty(self.tokens, d, **new)
        if self.init == "random":
            return normal(site, self.tokens, d, self.seed)
        if self.init == "like_tokens":
            return token_like(site, self.tokens, d, self.seed)
        table: Any = embeddings_of(site.module)
        num, draw = int(table.weight.shape[0]), torch.Generator().manual_seed(self.seed)
        ids = torch.randint(num, (self.tokens,), generator=draw) if self.init == "vocab" else torch.tensor(self._text_ids(num, site))
        return _embed(table, ids).to(**new)

    def _text_ids(self, num: int, site: Site) -> list[int]:
        """Return p token ids of the text, repeated or cut.

        Raises:
            SpecError: it gives none, or some that the model does not have.
        """
        ids = read_text(self.init_text, str(self.tokenizer)) if isinstance(self.init_text, str) else list(self.init_text or ())
        if not ids or max(ids) >= num:
            what = f"token {max(ids)}, and the model has {num}" if ids else "no token at all"
            raise SpecError(f"init_text= gives {what}", where=str(site), hint="use the tokenizer that belongs to this model")
        return (ids * math.ceil(self.tokens / len(ids)))[: self.tokens]


def normal(site: Site, p: int, d: int, seed: int) -> Tensor:
    """Return random vectors [p, d] of N(0, 1).

    Larger than the tokens of most models. On MiniLM, whose embeddings go through a norm, prompt tuning learns more from there (docs/arena).
    """
    return torch.randn(p, d, generator=torch.Generator().manual_seed(seed)).to(device=site.device, dtype=site.dtype)


def token_like(site: Site, p: int, d: int, seed: int) -> Tensor:
    """Return random vectors [p, d], centred and as spread as the token embeddings of a body; of size 0.02 in front of any other module."""
    draw = torch.Generator().manual_seed(seed)
    table: Any = embeddings_of(site.module) if isinstance(site.kind, BodyKind) else None
    noise = torch.randn(p, d, generator=draw)
    if table is None:
        return (0.02 * noise).to(device=site.device, dtype=site.dtype)
    num = int(table.weight.shape[0])
    seen = _embed(table, torch.randint(num, (min(num, 1000),), generator=draw)).float()
    return (seen.mean(0) + seen.std(0) * noise.to(seen.device)).to(device=site.device, dtype=site.dtype)


def _embed(table: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = table(ids.to(table.weight.device))
    return found.detach()


def read_text(text: str, tokenizer: str) -> list[int]:
    """Return the token ids of a text.

    Raises:
        SpecError: there is no such tokenizer.
    """
    try:
        from transformers import AutoTokenizer

        found: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=Path(tokenizer).is_dir())
        return [int(i) for i in found(text)["input_ids"]]
    except (OSError, ValueError, ImportError) as error:
        raise SpecError(
            f"the tokenizer cannot be read: {str(error).splitlines()[0][:200]}",
            where=f"tokenizer={tokenizer!r}",
            hint="a folder with tokenizer.json (tokenizer.save_pretrained(folder)), or token ids in init_text=",
        ) from None
