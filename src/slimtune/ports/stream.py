"""The stream port: virtual tokens in front of a body's input, taken out of its output again.

    x [n, d] -> [e_1 .. e_p, x_1 .. x_n] -> body -> its hidden states of x alone

Heads, labels and losses lie outside of the body and keep the user's length; what follows the last virtual token is not predicted, as the first
token never is. A pooler inside the body (BERT) reads the first virtual token; a head outside that reads the first place (RoBERTa) reads the
first real token, unless the op has `keep`: then the virtual tokens stay in the output, as they do in the reference library.

Plans mean: a stack puts prompts one after the other, a weighted sum adds prompts of one length, rows may have prompts of different lengths or
none (`ports.frame`). With a cache the virtual tokens enter it at the first call; later calls only extend mask and positions. An op with
`shift` moves positions without adding tokens: prefix tuning keeps its keys in front of everything. The encoder of an encoder-decoder keeps
its virtual tokens, since the decoder attends to them; a `ReaderOp` on the decoder extends the mask they are read through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from slimtune.core.errors import TargetError
from slimtune.core.plan import Plan
from slimtune.core.site import Site
from slimtune.core.targets import find_modules
from slimtune.ports import trial
from slimtune.ports.body import FOREIGN, Body, is_body, pairs, prompted, study
from slimtune.ports.linear import BlockKind
from slimtune.ports.stream_body import extended, read_longer
from slimtune.ports.stream_plain import plain
from slimtune.ports.transformers_internals import is_recurrent
from slimtune.ports.virtual import ReaderOp, StreamOp, has_port

if TYPE_CHECKING:
    from slimtune.core.spec import Spec

AUTO = "auto"  # targets of a spec that goes in front of the bodies of a model


def stream_sites(model: nn.Module, spec: Spec) -> list[Site]:
    """Return the sites of a spec at the stream port: bodies (port "stream"), and decoders that read them (port "reader").

    Raises:
        TargetError: there is no such place.
    """
    readers: dict[str, nn.Module] = {}
    if spec.targets == AUTO:
        found, readers = prompted(model)
    else:
        from slimtune.core.placing import kind_at

        found = find_modules(model, spec.targets, spec.layers, spec.exclude, lambda m: isinstance(m, nn.Module) and "stream" in kind_at(m).ports)
        heads = {p: m for p, m in found.items() if is_body(m) and any(is_body(c) for c in m.modules() if c is not m)}
        if heads:
            path, module = next(iter(heads.items()))
            inner = next(p for p, m in module.named_modules() if m is not module and is_body(m))
            raise TargetError(
                "virtual tokens go in front of the innermost body, not of a model around it",
                where=f"{path or '(the model)'} ({type(module).__name__})",
                hint=f'targets="{path}.{inner}"'.replace('".', '"'),
            )
        for encoder, decoder in pairs(model):
            if any(m in set(encoder.modules()) for m in found.values()):
                reading = set(decoder.modules())
                readers |= {p: m for p, m in prompted(model)[1].items() if m in reading and p not in found}
    return [_site(p, "stream", m) for p, m in found.items()] + [_site(p, "reader", m) for p, m in readers.items()]


def _site(path: str, port: str, module: nn.Module) -> Site:
    from slimtune.core.placing import kind_at

    return Site(path=path, port=port, kind=kind_at(module), module=module)


def stream_problems(site: Site, width: int | None) -> list[str]:
    """Return what stops virtual tokens at a site.

    Args:
        width: d, which a module that is no body of a transformers model cannot tell by itself.
    """
    if not isinstance(site.kind, BodyKind):
        return [] if width else [f"{type(site.module).__name__} is no body of a transformers model: say how wide its input is with width=d"]
    facts = study(site.module)
    wrong = [f"its argument {name} cannot be extended by virtual tokens: {why}" for name, why in FOREIGN.items() if name in facts.names]
    if is_recurrent(site.module):
        wrong.append("it is recurrent: the state that it keeps between calls counts no places, so virtual tokens could not be told from none")
    if site.port == "stream" and not facts.width:
        wrong.append("it has no token embeddings")
    if site.port == "stream" and width not in (None, facts.width):
        wrong.append(f"its embeddings are {facts.width} wide, not {width}")
    return wrong


def room_problems(site: Site, p: int) -> list[str]:
    """Return what is wrong with moving the tokens of a body p positions on."""
    limit = study(site.module).limit if isinstance(site.kind, BodyKind) else 0
    return [f"{p} virtual tokens leave none of its {limit} positions for a token of the input: use fewer"] if 0 < limit <= p else []


def width_of(site: Site, width: int | None) -> int:
    """Return d at a site."""
    return study(site.module).width if isinstance(site.kind, BodyKind) else int(width or 0)


class PromptedBlockKind(BlockKind):
    """Any module: its first tensor [B, n, d] can get virtual tokens at dim 1, if it is called with nothing else that counts tokens."""

    ports: ClassVar[tuple[str, ...]] = ("output", "stream")

    def forward(self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not has_port(host, plan, {"stream"}):
            return super().forward(host, base, plan, args, kwargs)

        def streamed(*a: Any, **k: Any) -> Any:
            return plain(host, base, plan, a, k)

        if has_port(host, plan, {"output"}):
            return super().forward(host, streamed, plan, args, kwargs)
        return streamed(*args, **kwargs)


class BodyKind(BlockKind):
    """The body of a transformers model."""

    ports: ClassVar[tuple[str, ...]] = ("output", "stream", "reader")

    def fits(self, module: Any) -> bool:
        return is_body(module)

    def study(self, module: Any) -> Body:
        return study(module)

    def forward(self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def streamed(*a: Any, **k: Any) -> Any:
            given = dict(zip(host.slim.facts.names, a, strict=False)) | k
            if has_port(host, plan, {"reader"}):
                given = read_longer(host, plan, given)
            if not has_port(host, plan, {"stream"}):
                return base(**given)
            trial.of_body(host, plan, device_of(given))
            return extended(host, base, plan, given)

        if has_port(host, plan, {"output"}):
            return super().forward(host, streamed, plan, args, kwargs)
        return streamed(*args, **kwargs)


def device_of(given: dict[str, Any]) -> torch.device:
    """Return where the tokens of a forward are."""
    return next((t.device for t in given.values() if isinstance(t, torch.Tensor)), torch.device("cpu"))


__all__ = ["AUTO", "BodyKind", "PromptedBlockKind", "ReaderOp", "StreamOp", "room_problems", "stream_problems", "stream_sites", "width_of"]
