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
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, PlanError, TargetError
from slimtune.core.fold import Chain, entries, first_tensor, members, put, replace_first, take
from slimtune.core.kind import join, split_input
from slimtune.core.op import Op
from slimtune.core.plan import Plan
from slimtune.core.site import Site
from slimtune.core.targets import find_modules
from slimtune.core.tasks import tasks_of
from slimtune.ports.body import FOREIGN, Body, embeddings_of, is_body, pairs, prompted, study
from slimtune.ports.frame import Frame, frame, left_padded
from slimtune.ports.linear import BlockKind

if TYPE_CHECKING:
    from slimtune.core.spec import Spec

AUTO = "auto"  # targets of a spec that goes in front of the bodies of a model
# What else holds one thing for each token: what a virtual token gets there.
PER_TOKEN = {"token_type_ids": 0, "visual_pos_masks": 0, "mm_token_type_ids": 0, "global_attention_mask": 0}
Segment: TypeAlias = "tuple[slice | Tensor | None, Chain, list[int] | None]"


class StreamOp(Op):
    """Base of every op at the stream port.

    Attributes:
        tokens: p, how many virtual tokens it puts in front; may be 0.
        shift: positions it leaves free before them, without tokens.
        keep: the body's output keeps the virtual tokens in front, so that heads which read the first place read the first of them.
    """

    tokens: int = 0
    shift: int = 0
    keep: bool = False

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        """Return the virtual tokens: [p, d], or [m, p, d] where rows differ.

        Args:
            x: the embedded tokens of the m rows this op acts on [m, n, d].
            tasks: task of each of them [m], if `st.tasks` has said so.
        """
        raise NotImplementedError


class ReaderOp(Op):
    """On the decoder of an encoder-decoder: the encoder's output is `tokens` longer than its input. Nothing to train."""

    def __init__(self, site: Site, tokens: int) -> None:
        super().__init__(site)
        self.tokens = tokens

    def settings(self) -> dict[str, Any]:
        return {"tokens": self.tokens}


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
    if site.port == "stream" and not facts.width:
        wrong.append("it has no token embeddings")
    if site.port == "stream" and width not in (None, facts.width):
        wrong.append(f"its embeddings are {facts.width} wide, not {width}")
    return wrong


def width_of(site: Site, width: int | None) -> int:
    """Return d at a site."""
    return study(site.module).width if isinstance(site.kind, BodyKind) else int(width or 0)


class PromptedBlockKind(BlockKind):
    """Any module: its first tensor [B, n, d] can get virtual tokens at dim 1, if it is called with nothing else that counts tokens."""

    ports: ClassVar[tuple[str, ...]] = ("output", "stream")

    def forward(self, host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _has(host, plan, {"stream"}):
            return super().forward(host, base, plan, args, kwargs)

        def streamed(*a: Any, **k: Any) -> Any:
            return _plain(host, base, plan, a, k)

        if _has(host, plan, {"output"}):
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
            if _has(host, plan, {"reader"}):
                given = _read_longer(host, plan, given)
            return _extended(host, base, plan, given) if _has(host, plan, {"stream"}) else base(**given)

        if _has(host, plan, {"output"}):
            return super().forward(host, streamed, plan, args, kwargs)
        return streamed(*args, **kwargs)


# ---- what a plan means here ------------------------------------------------------------------------------------------
def _has(host: Any, plan: Plan, ports: set[str]) -> bool:
    return any(op.port in ports for name in plan.names for op in host.slim.ops(name))


def at_port(chain: Chain, port: str) -> Chain:
    """Return the part of a chain that sits at one port."""
    found: Chain = []
    for link in chain:  # plain loops: this is compiled
        kept: list[tuple[Op, Tensor | None]] = []
        for entry, w in link:
            ops = [op for op in members(entry) if op.port == port]
            if ops:
                kept += entries(ops, w)
        if kept:
            found.append(kept)
    return found


def every(chain: Chain) -> list[Any]:
    """Return all ops of a chain."""
    return [op for link in chain for entry, _ in link for op in members(entry)]


def measure(chain: Chain, where: str) -> tuple[int, int]:
    """Return (virtual tokens, shift) of a chain.

    Raises:
        CapabilityError: a weighted sum of prompts of different lengths.
    """
    tokens = shift = 0
    for link in chain:
        ops: list[list[Any]] = [members(entry) for entry, _ in link]
        sizes = {(sum(op.tokens for op in e), sum(op.shift for op in e if isinstance(op, StreamOp))) for e in ops}
        if len(sizes) > 1:
            raise CapabilityError(
                f"a weighted sum adds prompts token by token, and these are {', '.join(str(max(s)) for s in sorted(sizes))} tokens long",
                where=where,
                hint="stack them (a list of names) to put one after the other, or train prompts of one length",
            )
        tokens, shift = tokens + next(iter(sizes))[0], shift + next(iter(sizes))[1]
    return tokens, shift


def segments(host: Any, plan: Plan, batch: int, device: torch.device, port: str) -> list[Segment]:
    """Return (rows, chain, row numbers) of each segment of a plan at one port; rows are None where the plan is the same for all."""
    if plan.size is None:
        return [(None, at_port(host.slim.chain(plan.segments[0][1]), port), None)]
    k = batch // plan.size
    chosen = plan.selectors(batch, device, host.slim.path, type(host).__name__)
    found: list[Segment] = []
    for rows, (numbers, links) in zip(chosen, plan.segments, strict=True):
        own = list(range(plan.size)) if numbers is None else numbers
        found.append((rows, at_port(host.slim.chain(links), port), [i * k + j for i in own for j in range(k)]))
    return found


def _framed(host: Any, parts: list[Segment], batch: int, mask: Tensor | None, causal: bool, device: torch.device) -> Frame:
    """Return the frame of a batch."""
    where = f"{host.slim.path} ({type(host).__name__})"
    sizes = [measure(chain, where) for _, chain, _ in parts]
    if parts[0][0] is None:
        return frame(*sizes[0], mask, causal, device)
    counts, skips = [0] * batch, [0] * batch
    for (p, s), (_, _, numbers) in zip(sizes, parts, strict=True):
        for i in numbers or ():
            counts[i], skips[i] = p, s
    return frame(counts, skips, mask, causal, device)


def _virtual(host: Any, plan: Plan, parts: list[Segment], x: Tensor, P: int) -> Tensor:
    """Return the virtual tokens of a batch [B, P, d], filled up in front with zeros."""
    tasks = tasks_of(host.slim.state, x.shape[0], x.device, plan.expand)
    if parts[0][0] is None:
        return joined(parts[0][1], x, tasks).expand(x.shape[0], -1, -1)
    out = x.new_zeros(x.shape[0], P, x.shape[-1])
    for rows, chain, _ in parts:
        if chain:
            assert rows is not None
            mine = take(x, rows, 0)
            made = joined(chain, mine, None if tasks is None else take(tasks, rows, 0))
            if made.shape[1]:
                out = put(out, rows, left_padded(made, P).expand(mine.shape[0], -1, -1), 0)
    return out


def joined(chain: Chain, x: Tensor, tasks: Tensor | None) -> Tensor:
    """Return the virtual tokens of one chain, [1 or m, p, d]: links one after the other."""
    found = []
    for link in chain:
        total: Tensor | None = None
        for entry, w in link:
            rows = _together([op.rows(x, tasks) for op in members(entry) if op.tokens], x)  # type: ignore[attr-defined, operator]
            rows = rows if w is None else (w * rows).to(x.dtype)
            total = rows if total is None else total + rows
        if total is not None:
            found.append(total)
    return _together(found, x)


def _together(parts: list[Tensor], x: Tensor) -> Tensor:
    """Return prompts [p, d] or [m, p, d] one after the other, [1 or m, p, d], in the type of x."""
    if not parts:
        return x.new_zeros(1, 0, x.shape[-1])
    whole = [(t[None] if t.dim() == 2 else t).to(device=x.device, dtype=x.dtype) for t in parts]
    m = max([t.shape[0] for t in whole])
    return torch.cat([t.expand(m, -1, -1) for t in whole], 1)


# ---- the body of a transformers model --------------------------------------------------------------------------------
def _extended(host: Any, base: Callable[..., Any], plan: Plan, given: dict[str, Any]) -> Any:
    """Run a body with the virtual tokens of each row."""
    facts: Body = host.slim.facts
    where = f"{host.slim.path} ({type(host).__name__})"
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    tokens = ids if embeds is None else embeds
    if not isinstance(tokens, Tensor):
        return base(**given)  # the body's own error says what is missing
    batch, n = tokens.shape[:2]
    device = tokens.device
    parts = segments(host, plan, batch, device, "stream")
    flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    at = _framed(host, parts, batch, flat, facts.causal, device)
    if mask is not None and flat is None and at.P:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(
            f"virtual tokens need the mask of the tokens [batch, tokens], and this attention_mask is {shape}",
            where=where,
            hint="pass the 2-D mask and let the model build the rest, or st.use(model, None)",
        )
    if at.P == 0 and isinstance(at.skip, int) and at.skip == 0:
        return base(**given)
    past = _past(given.get("past_key_values"), at, where)
    first = isinstance(past, int) and past == 0
    own_past = past if first else past - at.P
    _check(facts, given, at, batch, n, own_past, where)
    if mask is None and not at.even:
        mask = torch.ones(batch, n + int(own_past), dtype=torch.long, device=device)
    if mask is not None and at.P:
        given["attention_mask"] = at.mask(mask)
    if facts.positions:
        own = given.get("position_ids")
        skips = not isinstance(at.skip, int) or at.skip > 0
        if own is None and (skips or ((facts.causal or facts.start > 0) and mask is not None and not facts.from_mask)):
            own = at.by_itself(n, own_past, facts.start, device)
        if own is not None:
            given["position_ids"] = at.positions(own, facts.start, first)
    if not first or at.P == 0:
        return base(**given)
    table = embeddings_of(host)
    assert table is not None
    x = embeds if embeds is not None else table(ids)
    given["input_ids"], given["inputs_embeds"] = None, at.arrange(torch.cat([_virtual(host, plan, parts, x, at.P), x], 1))
    for name, value in PER_TOKEN.items():
        t = given.get(name)
        if t is not None:
            given[name] = at.arrange(F.pad(t, (at.P, 0), value=value))
    out = base(**given)
    _mark(given.get("past_key_values"), out, at)
    kept = {op.keep for _, chain, _ in parts for op in every(chain) if op.tokens}
    if len(kept) > 1:
        raise PlanError(
            "one batch mixes prompts that stay in the body's output with prompts that do not",
            where=where,
            hint="a prompt that stays there for a head which reads the first token, and one that does not, need batches of their own",
        )
    return out if kept == {True} else stripped(out, at, n)


def _past(cache: Any, at: Frame, where: str) -> int | Tensor:
    """Return how many places a cache holds.

    Raises:
        PlanError: it was not filled under this plan.
    """
    if cache is None:
        return 0
    length: int | Tensor = cache.get_seq_length()
    if torch.compiler.is_compiling():
        return length
    length = int(length)
    if length and at.P and cache.__dict__.get("slim_prompt") != at.key:
        raise PlanError(
            f"the cache was filled without the virtual tokens of this plan (it holds {length} places)",
            where=where,
            hint="run the prompt and all that follows under one plan, beginning with an empty cache",
        )
    return length


def _mark(cache: Any, out: Any, at: Frame) -> None:
    """Note on a cache which virtual tokens it holds."""
    if cache is None and not isinstance(out, (Tensor, tuple)):
        cache = out.get("past_key_values")
    if cache is not None and not torch.compiler.is_compiling():
        cache.slim_prompt = at.key


def _check(facts: Body, given: dict[str, Any], at: Frame, batch: int, n: int, past: int | Tensor, where: str) -> None:
    """Raise where the virtual tokens of a batch cannot be put into its arguments."""
    if not at.even and facts.causal and facts.absolute and not facts.positions:
        raise CapabilityError(
            "rows with prompts of different lengths need position_ids, which this body does not take",
            where=where,
            hint="use prompts of one length in a batch, or batches of one prompt each",
        )
    if torch.compiler.is_compiling():
        return
    ahead = at.moved if isinstance(at.moved, int) else int(at.moved.max())
    if facts.limit and int(past) + ahead + n > facts.limit:
        raise PlanError(
            f"{int(past) + n} tokens and {ahead} virtual ones are more than the {facts.limit} positions of this body",
            where=where,
            hint=f"cut the input to {facts.limit - ahead} tokens",
        )
    own = given.get("position_ids")
    if at.P and own is not None and given.get("attention_mask") is None and n > 1 and bool((own.diff(dim=-1) < 0).any()):
        raise CapabilityError(
            "position_ids start anew inside a row: several sequences are packed into it, and a prompt would reach the first one only",
            where=where,
            hint="give each sequence a row of its own (no packing), with padding and an attention_mask",
        )
    known = {*PER_TOKEN, "input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_hidden_states", "encoder_attention_mask"}
    for name, value in given.items():
        counts_tokens = isinstance(value, Tensor) and (value.shape[:2] == (batch, n) or name == "cache_position")
        if at.P and counts_tokens and name not in known:
            raise CapabilityError(
                f"{name} {list(value.shape)} holds something for each token, and what a virtual token gets there is not known",
                where=where,
                hint=f"leave {name} out, or use prefix tuning, which adds no tokens",
            )


def stripped(out: Any, at: Frame, n: int) -> Any:
    """Take the virtual tokens out of everything a body returns for each token; attention maps keep their columns."""
    length = at.P + n

    def strip(t: Any) -> Any:
        if isinstance(t, tuple) and not hasattr(t, "_fields") and all(isinstance(e, Tensor) for e in t):
            return tuple(strip(e) for e in t)
        if isinstance(t, Tensor) and t.dim() == 3 and t.shape[1] == length:
            return at.strip(t)
        return at.strip(t, 2) if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == length else t

    if isinstance(out, (Tensor, tuple)):
        return strip(out) if isinstance(out, Tensor) else tuple(strip(t) for t in out)
    for key in out:
        if key != "past_key_values":
            out[key] = strip(out[key])
    return out


def _read_longer(host: Any, plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Extend the mask through which a decoder reads the encoder's output."""
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if states is None:
        return given
    batch, length = states.shape[:2]
    at = _framed(host, segments(host, plan, batch, states.device, "reader"), batch, mask, False, states.device)
    if at.P == 0 or (mask is None and at.even):
        return given
    if mask is None:
        mask = torch.ones(batch, length - at.P, dtype=torch.long, device=states.device)
    if mask.dim() != 2 or mask.shape[1] + at.P != length:
        raise PlanError(
            f"the encoder's output has {length} places; {at.P} virtual ones and a mask {list(mask.shape)} do not make them up",
            where=f"{host.slim.path} ({type(host).__name__})",
            hint="compute encoder_outputs under the same plan as the rest, and pass the 2-D mask of the input tokens",
        )
    return {**given, "encoder_attention_mask": at.mask(mask)}


# ---- any other module ------------------------------------------------------------------------------------------------
def _plain(host: Any, base: Callable[..., Any], plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module with virtual tokens at dim 1 of its first tensor; rows with different prompts run one after the other."""
    where = f"{host.slim.path} ({type(host).__name__})"
    x, rest, kw = split_input(args, kwargs)
    if x.dim() != 3 or not x.is_floating_point():
        raise PlanError(f"virtual tokens go into [batch, tokens, width], not into {list(x.shape)} {x.dtype}", where=where, hint="name another module")
    batch, n = x.shape[:2]
    others = [t for t in (*rest, *kw.values()) if isinstance(t, Tensor) and n in t.shape]
    if others:
        raise CapabilityError(
            f"the module also gets a tensor {list(others[0].shape)} that may count its tokens, which virtual ones would not fit",
            where=where,
            hint="call it with its tokens alone: rows may have different prompts without a mask",
        )

    def run(xs: Tensor, chain: Chain, tasks: Tensor | None) -> Any:
        virtual = joined(chain, xs, tasks)
        p = virtual.shape[1]
        out = join(base, torch.cat([virtual.expand(xs.shape[0], -1, -1), xs], 1), rest, kw)
        y = first_tensor(out)
        if y.dim() < 2 or y.shape[1] != p + n:
            raise PlanError(f"the output {list(y.shape)} has not one place for each of {p} + {n} tokens", where=where, hint="name another module")
        kept = any(op.keep for op in every(chain))
        return out if kept or not p else replace_first(out, y[:, p:])

    tasks = tasks_of(host.slim.state, batch, x.device, plan.expand)
    parts = segments(host, plan, batch, x.device, "stream")
    if parts[0][0] is None:
        return run(x, parts[0][1], tasks)
    total: Tensor | None = None
    for rows, chain, _ in parts:
        assert rows is not None
        out = run(take(x, rows, 0), chain, None if tasks is None else take(tasks, rows, 0))
        if not isinstance(out, Tensor):
            raise CapabilityError(
                f"rows= cannot be put together from what the module returns ({type(out).__name__})", where=where, hint="one plan for all rows"
            )
        total = out.new_zeros(batch, *out.shape[1:]) if total is None else total
        total = put(total, rows, out, 0)
    return total
