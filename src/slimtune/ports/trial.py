"""Trial: before virtual tokens or prefixes act on a model for the first time, a few tokens are compared with the bare base of that very model.

    virtual tokens      = the base called with the same embeddings in front: at once, token by token with a cache, and beside a row without any
    prefixes            = the base with a cache that holds the same keys and values: at once, and token by token
    generate            = the model's own forward without a cache over what was generated

Run always, on every version: models are patched, and most architectures were never in a test suite. It costs about ten forwards of at most six
tokens, once per process for each (classes with their forwards, configuration, type, version of transformers). A trial that fails is an
InternalsError; one that cannot be made (the base itself cannot be called that way) is an error on versions that were never tested, and a warning
on the others. How close is close follows from the base: its own rounding between two ways to compute the same.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.errors import CapabilityError, InternalsError, PlanError
from slimtune.core.fold import first_tensor
from slimtune.core.host import Slot
from slimtune.core.mixing import base_class
from slimtune.core.op import Op
from slimtune.core.plan import Plan
from slimtune.core.state import BARE, Adapter, State
from slimtune.core.tasks import no_tasks
from slimtune.ports import transformers_internals as internals
from slimtune.ports.body import Body
from slimtune.ports.virtual import StreamOp

NAME = "slimtune-trial"  # of the adapter that stands in for the user's: not a name that users can give
P, N = 2, 4  # virtual tokens, tokens
RESULTS: dict[Any, tuple[str, str]] = {}  # what has been tried -> ("passed" | "failed" | "untried", why)
_LOCK = threading.RLock()
_RUNNING = threading.local()


class Untried(Exception):
    """The base itself cannot be called in the way that a trial compares with."""


class TrialTokens(StreamOp):
    """Virtual tokens [P, d], or a shift of positions."""

    def __init__(self, tokens: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.port, self.param, self.given = "stream", "stream", tokens
        self.tokens, self.shift = (0, P) if tokens is None else (P, 0)

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        assert self.given is not None
        return self.given


class TrialPrefix(Op):
    """Keys and values [P, heads, width]."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        nn.Module.__init__(self)
        self.port, self.param, self.pair = "attention", "attention", pair

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.pair


# ---- when ------------------------------------------------------------------------------------------------------------
def of_body(host: Any, plan: Plan, device: torch.device) -> None:
    """Try what a plan does at a body, if that has not been tried.

    Raises:
        InternalsError: the body behaves otherwise than slimtune assumes, or cannot be tried on a version that was never tested.
    """
    facts: Body = host.slim.facts
    if facts.tried >= {"tokens", "shift"} or getattr(_RUNNING, "now", False):
        return
    ops = [op for name in plan.names for op in host.slim.ops(name) if isinstance(op, StreamOp)]
    for kind, run in (("tokens", _virtual_tokens), ("shift", _prefixes)):
        if kind in facts.tried or not any(getattr(op, kind) for op in ops):
            continue
        what = "virtual tokens in front of its input" if kind == "tokens" else "keys and values in front of its attention"
        if _settle(host, what, (kind,), run, host, device):
            facts.tried.add(kind)


def of_generation(model: Any, plan: Plan, implementation: str | None, device: torch.device) -> None:
    """Try `generate` of a model with virtual tokens, if that has not been tried.

    Raises:
        InternalsError: as for `of_body`.
    """
    if getattr(_RUNNING, "now", False) or model.config.is_encoder_decoder:  # there, what is cached has no virtual tokens
        return
    hosts = [m for m in model.modules() if isinstance(m._modules.get("slim"), Slot) and isinstance(m._modules["slim"].facts, Body)]
    used = [m for m in hosts if any(op.port == "stream" and op.tokens for name in plan.names for op in m.slim.ops(name))]
    if len(used) == 1 and used[0].slim.facts.causal:
        problem = internals.generation_problem(model)
        if problem:
            raise _error("failed", problem, model, "virtual tokens in `generate`")
        _settle(model, "virtual tokens in `generate`", (implementation,), _generation, model, used[0], implementation, device)


def _settle(module: Any, what: str, more: tuple[Any, ...], run: Callable[..., None], *args: Any) -> bool:
    """Run a trial once and raise what came of it; False where it cannot be run now."""
    if not _possible(module):
        if torch.compiler.is_compiling() and not internals.is_tested(internals.version()):
            raise _error("untried", "a compiled forward cannot be tried: run the model once before it is compiled", module, what)
        return False
    key = (run.__name__, *more, *fingerprint(module))
    with _LOCK:
        if key not in RESULTS:
            _RUNNING.now = True
            try:
                with _quiet(module), no_tasks(state_of(module)):
                    run(*args)
                RESULTS[key] = ("passed", "")
            except Untried as reason:
                RESULTS[key] = ("untried", str(reason))
            except AssertionError as reason:
                RESULTS[key] = ("failed", str(reason))
            finally:
                _RUNNING.now = False
        result, why = RESULTS[key]
    if result == "failed" or (result == "untried" and not internals.is_tested(internals.version())):
        raise _error(result, why, module, what)
    if result == "untried":
        warnings.warn(f"{what} of {type(module).__name__} could not be compared with its base: {why}", stacklevel=2)
    return True


def _error(result: str, why: str, module: Any, what: str) -> InternalsError:
    number = internals.version()
    known = "" if internals.is_tested(number) else ", a version that slimtune was never tested with,"
    found = "do not act as they must" if result == "failed" else "cannot be compared with the bare base"
    return InternalsError(
        f"{what} {found}: {why}",
        where=f"{type(module).__name__} of transformers {number}{known} with {_attention(module)} attention",
        hint=f"{internals.install_hint()}; or a method that changes weights (st.LoRA)",
    )


def state_of(module: Any) -> State:
    """Return the state of a root or a host."""
    state: State | None = module.__dict__.get("slim_state")
    return module.slim.state if state is None else state  # type: ignore[no-any-return]


def _attention(module: Any) -> str:
    return str(getattr(module.config, "_attn_implementation", None) or "its own")


def _possible(module: nn.Module) -> bool:
    """Tell whether forwards run for real here: no tracing, no fake tensors, no counting, no vmap."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    table = internals.token_embeddings(module)
    return table is not None and not table._parameters["weight"].is_meta  # type: ignore[union-attr]


def fingerprint(module: Any) -> tuple[Any, ...]:
    """Return what decides how a model computes, whatever its weights: another one of the same need not be tried again."""
    classes = frozenset((base_class(m), base_class(m).forward) for m in module.modules() if not isinstance(m, Op))  # type: ignore[attr-defined]
    config: Any = module.config
    text = config.to_json_string(use_diff=False) if hasattr(config, "to_json_string") else repr(config)
    table: Any = internals.token_embeddings(module)
    return classes, text, _attention(module), table.weight.dtype, table.weight.device.type, internals.version()


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Leave no trace: no gradients, no dropout, random numbers as before."""
    modes = [(m, m.training) for m in module.modules()]
    drawn = torch.get_rng_state()
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        torch.set_rng_state(drawn)


# ---- what ------------------------------------------------------------------------------------------------------------
def _virtual_tokens(host: Any, device: torch.device) -> None:
    facts: Body = host.slim.facts
    ids = _ids(host, device)
    table: Any = internals.token_embeddings(host)
    call = _Caller(host, "the base called with the same embeddings in front")
    x = call.base(lambda: table(ids))  # [1, N + P, d]
    x, front = x[:, :N], x[:, N:]
    ids = ids[:, :N]
    prompt = TrialTokens(front[0])
    longer = torch.cat([front, x], 1)  # [1, P + N, d]
    whole, bare = call.bare(longer), call.bare(x)
    stepwise = facts.causal and call.cache is not None
    noise = [call.bare(torch.cat([x, x]))[:1] - bare, *([call.steps(BARE, x) - bare[:, -1:]] if stepwise else [])]
    call.scale(whole, bare, *noise)
    call.same(call.bare(ids), bare, "for ids and for what `get_input_embeddings()` makes of them")
    with _acting({host.slim: prompt}):
        call.same(whole[:, P:], call.acting(Plan.of(NAME), ids), "all at once")
        if stepwise:
            call.same(call.steps(BARE, longer), call.steps(Plan.of(NAME), ids), "token by token with a cache")
        gap, last = (0, -1) if facts.causal else (-1, -2)  # a place of the first row that is padding, and that of its last token
        two, mask = ids.repeat(2, 1), torch.ones(2, N, dtype=torch.long, device=device)
        two[0] = ids[0].roll(1) if facts.causal else ids[0]
        two[0, gap], mask[0, gap] = getattr(host.config, "pad_token_id", None) or 0, 0
        if not call.forward_is_finite(two, mask):
            return  # nor does the base bear padding
        try:
            mixed = call.acting(Plan.of_rows([NAME, None]), two, mask)
        except (CapabilityError, PlanError):  # rows with different prompts are refused here anyway
            return
        call.same(call.bare(longer[:, :-1])[:, -1], mixed[:1, last], "beside a row without any, with padding")
        call.same(bare[:, -1], mixed[1:, -1], "for a row without any beside one that has them")


def _prefixes(host: Any, device: torch.device) -> None:
    from slimtune.ports.attend import AttendKind

    facts: Body = host.slim.facts
    layers = [m for m in host.modules() if isinstance(m._modules.get("slim"), Slot) and isinstance(m.slim.kind, AttendKind)]
    blocks = getattr(host.config, "num_hidden_layers", 0)
    call = _Caller(host, "the base with a cache that holds the same keys and values")
    numbers = [getattr(m, "layer_idx", None) for m in layers]
    if not facts.causal or call.cache is None or sorted(n for n in numbers if n is not None) != list(range(blocks)) or len(layers) != blocks:
        return  # no cache can hold the same: what is left is that each layer asks for its function, which each forward sees to
    window = getattr(host.config, "sliding_window", None)
    if window is not None and window < P + N:  # a cache would let go of the prefix, which the tokens here always see
        raise Untried(f"its window of {window} tokens is too short")
    ids = _ids(host, device)[:, :N]
    draw = torch.Generator().manual_seed(0)
    table: Any = internals.token_embeddings(host)
    pairs = {}
    for m in layers:
        heads, wide_k, wide_v = m.slim.kind.key_value(m)  # type: ignore[union-attr, operator]
        new: dict[str, Any] = {"device": device, "dtype": table.weight.dtype}
        pairs[m] = tuple(torch.randn(P, heads, width, generator=draw).to(**new) for width in (wide_k, wide_v))
    table_x = call.base(lambda: table(ids))
    whole = call.filled(pairs, ids)
    bare = call.bare(table_x)
    call.scale(whole, bare, call.bare(torch.cat([table_x, table_x]))[:1] - bare, call.steps(BARE, table_x) - bare[:, -1:])
    ops: dict[Slot, Op] = {m.slim: TrialPrefix(pair) for m, pair in pairs.items()}  # type: ignore[misc, arg-type]
    with _acting({**ops, host.slim: TrialTokens(None)}):
        call.same(whole, call.acting(Plan.of(NAME), ids), "all at once")
        call.same(whole[:, -1:], call.steps(Plan.of(NAME), ids), "token by token with a cache")


def _generation(model: Any, host: Any, implementation: str | None, device: torch.device) -> None:
    state: State = model.slim_state
    table: Any = internals.token_embeddings(host)
    call = _Caller(host, "the model's own forward without a cache")
    ids = _ids(host, device)
    prompt, ids = TrialTokens(call.base(lambda: table(ids[:, N:]))[0]), ids[:, :N]
    options: dict[str, Any] = {
        "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True,
        "output_logits": True, "pad_token_id": int(ids[0, 0]), "eos_token_id": int(ids[0, 0]),
    }  # fmt: skip
    if implementation is not None:
        options["cache_implementation"] = implementation

    def generated(plan: Plan, mask: Tensor) -> tuple[Tensor, Tensor]:
        leave = state.enter(plan)
        try:
            two = ids.expand(2, -1)
            made = model.generate(input_ids=two, attention_mask=mask, **options)
            seen = torch.cat([mask, mask.new_ones(2, 2)], 1)
            own = model(input_ids=made.sequences, attention_mask=seen, use_cache=False).logits[:, N - 1 : -1]
            return torch.stack(list(made.logits), 1).float(), own.float()
        finally:
            leave()

    mask = torch.ones(2, N, dtype=torch.long, device=device)
    stepwise, own = call.base(lambda: generated(BARE, mask))
    mask[0, 0] = 0
    with _acting({host.slim: prompt}):
        state.adapters[NAME] = trial = Adapter.__new__(Adapter)
        trial.name, trial.ops, trial.spec, trial.trainable = NAME, {(host.slim.path, "stream"): prompt}, None, False  # type: ignore[assignment]
        try:
            ours, want = call.tried(lambda: generated(Plan.of(NAME), mask))
        finally:
            del state.adapters[NAME]
    call.scale(want, own, stepwise - own)
    call.same(want, ours, "with padding, token by token")


class _Caller:
    """Calls one body with and without the adapter on trial."""

    def __init__(self, host: Any, reference: str) -> None:
        self.host, self.reference, self.near = host, reference, 0.0
        names = host.slim.facts.names
        self.cache = internals.cache_argument(host) if "use_cache" in names or internals.takes_more(base_class(host)) else None

    def base(self, run: Callable[[], Any]) -> Any:
        """Run something that the adapter on trial has no part in."""
        try:
            return run()
        except Exception as error:
            raise Untried(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}") from error

    def tried(self, run: Callable[[], Any]) -> Any:
        """Run something that it has."""
        try:
            return run()
        except (CapabilityError, PlanError, AssertionError):
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise AssertionError(f"{type(error).__name__}: {text[0][:200] if text else ''}") from error

    def forward(self, plan: Plan, tokens: Tensor, mask: Tensor | None = None, **more: Any) -> Any:
        """Call the body with ids [B, n] or embeddings [B, n, d]."""
        leave = self.host.slim.state.enter(plan)
        try:
            name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device) if mask is None else mask
            if self.cache is not None and "use_cache" not in more:
                more["use_cache"] = False
            return type(self.host).forward(self.host, **{name: tokens, "attention_mask": mask}, **more)
        finally:
            leave()

    def bare(self, tokens: Tensor) -> Tensor:
        return self.base(lambda: first_tensor(self.forward(BARE, tokens)))  # type: ignore[no-any-return]

    def acting(self, plan: Plan, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.tried(lambda: first_tensor(self.forward(plan, ids, mask)))  # type: ignore[no-any-return]

    def forward_is_finite(self, ids: Tensor, mask: Tensor) -> bool:
        return bool(self.base(lambda: first_tensor(self.forward(BARE, ids, mask))).isfinite().all())

    def steps(self, plan: Plan, tokens: Tensor) -> Tensor:
        """Return the hidden state of the last token, read after the others with a cache."""

        def run() -> Tensor:
            out = self.forward(plan, tokens[:, :-1], use_cache=True)
            given = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            return first_tensor(self.forward(plan, tokens[:, -1:], given, use_cache=True, **{str(self.cache): internals.cache_in(out)}))

        return self.base(run) if plan is BARE else self.tried(run)  # type: ignore[no-any-return]

    def filled(self, pairs: Any, ids: Tensor) -> Tensor:
        """Return what the base gives with a cache of keys and values."""

        def run() -> Tensor:
            cache = internals.filled_cache(self.host, {m.layer_idx: pair for m, pair in pairs.items()})
            seen = torch.ones(1, P + N, dtype=torch.long, device=ids.device)
            return first_tensor(self.forward(BARE, ids, seen, use_cache=True, **{str(self.cache): cache}))

        return self.base(run)  # type: ignore[no-any-return]

    def scale(self, want: Tensor, without: Tensor, *noise: Tensor) -> None:
        """Say how near results must be: 4 times what the base differs by from itself, and at least half the digits of float32 (or 4 bits less than
        what a shorter type has): what is wrong by a token, a place or a mask is wrong in the first digit.

        Args:
            want, without: results with and without what is put in front.
            noise: differences of results of the base that mean the same.

        Raises:
            Untried: what is put in front changes less than that.
        """
        eps = torch.finfo(internals.token_embeddings(self.host).weight.dtype).eps  # type: ignore[union-attr, arg-type]
        self.near = max([max(16 * eps, 3.5e-4) * typical(want), *(4 * typical(t) for t in noise)])
        effect = typical(want[..., -1, :] - without[..., -1, :])
        if not effect > 2 * self.near:
            raise Untried(f"what is put in front changes its results by {effect:.1e}, and rounding by {self.near:.1e}")

    def same(self, want: Tensor, given: Tensor, how: str) -> None:
        """Raise AssertionError unless two results are the same."""
        far = typical(want.float() - given.float()) if want.shape == given.shape else float("inf")
        if not far <= self.near:
            raise AssertionError(f"{how}, results differ by {far:.1e} from {self.reference}, where rounding explains {self.near:.1e}")


def typical(t: Tensor) -> float:
    """Return the size of the middle channel, for the token where that is largest: a few channels may be far larger than all others."""
    return float(t.float().abs().median(-1).values.max())


def _ids(host: Any, device: torch.device) -> Tensor:
    """Return N + P ids [1, N + P] of tokens that nothing special is known of."""
    table: Any = internals.token_embeddings(host)
    config = host.config.to_dict() if hasattr(host.config, "to_dict") else {}
    special = {v for k, v in config.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    num = int(table.weight.shape[0])
    free = [i for i in range(num) if i not in special and i != getattr(table, "padding_idx", None)]
    if len(free) < N + P:
        raise Untried(f"it has {num} tokens only")
    return torch.tensor([free[:: len(free) // (N + P)][: N + P]], device=device)


@contextmanager
def _acting(ops: dict[Any, Op]) -> Iterator[None]:
    """Have ops stand in their slots under the name on trial."""
    for slot, op in ops.items():
        slot.put(NAME, op.port, op)
    try:
        yield
    finally:
        for slot in ops:
            slot.drop(NAME)
