"""The public verbs on live models: attach, detach, use, disabled, trainable, report, param_groups, keep_plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from slimtune.core.calls import shows
from slimtune.core.errors import MergeError, PlanError, SiteError, SpecError, TargetError
from slimtune.core.host import KeepPlan
from slimtune.core.op import Op
from slimtune.core.placing import check_free, install, put_to_use, uninstall
from slimtune.core.plan import Plan, Which
from slimtune.core.registry import spec_class
from slimtune.core.report import Report, make_report
from slimtune.core.rows import check_routed
from slimtune.core.scopes import opener
from slimtune.core.spec import Spec
from slimtune.core.state import Adapter, State, state_of, unwrap
from slimtune.core.task_head import settled


@shows("st.attach(model, st.LoRA(r=16))")
def attach(
    model: nn.Module,
    spec: Spec | type[Spec] | str,
    *,
    name: str = "default",
    dtype: torch.dtype | None = None,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> Report:
    """Add a new adapter to a model: active and trainable, with every other parameter frozen.

    The model itself changes, and goes on being used as before: `st.attach(model, ...)`, then `model(...)`.

    Args:
        model: any nn.Module; its class changes to a hidden subclass, its parameters and names do not move.
        spec: the recipe, such as `LoRA(r=16)`; a method's class or name, with its options beside it; or a config of the reference library.
        name: the adapter's name on this model.
        dtype: of the adapter's parameters; default: float32 for a half-precision or quantised base, else the base's own.
        data: a few batches as the model takes them (mappings, tuples or tensors), for a recipe that starts from data (`LoRA(init="eva")`).
        options: of the method, where `spec` is its class or name: `st.attach(model, "lora", r=8)`.

    Returns:
        A report of what matched, what did not, and what it costs.

    Raises:
        InvalidName, NameInUse, SpecError, TargetError, SiteError: before anything is changed.

    Example:
        >>> import slimtune as st, torch
        >>> report = st.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), st.LoRA(r=2))
        >>> report.trainable
        32
    """
    model = unwrap(model)
    recipe, notes = as_spec(spec, options)
    adapter = build(model, recipe, name, dtype, data=data)
    put_to_use(model, adapter)
    return make_report(model, adapter, notes)


def as_spec(given: Any, options: dict[str, Any]) -> tuple[Spec, list[str]]:
    """Return the spec that was meant by a spec, its class, a method's name or a config of the reference, and what to note about it.

    Raises:
        SpecError: none was meant, or options stand beside a spec that has its own.
    """
    if isinstance(given, str):
        given = spec_class(given)
    if isinstance(given, type) and issubclass(given, Spec):
        return given(**options), []
    notes: list[str] = []
    if not isinstance(given, Spec) and callable(getattr(given, "to_dict", None)) and hasattr(given, "peft_type"):
        from slimtune.files.layouts.from_config import spec_from_config

        given, notes = spec_from_config(given.to_dict())
    if not isinstance(given, Spec):
        raise SpecError(f"attach needs a spec, not {type(given).__name__}", hint="st.attach(model, st.LoRA(r=16))")
    if options:
        written = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise SpecError(
            f"attach takes options of the method beside its class or name, not beside a spec: {written}",
            where=f"st.attach(model, {given}, {written})",
            hint=f"st.attach(model, st.{type(given).__name__}({next(iter(options))}=...))",
        )
    return given, notes


def build(
    model: nn.Module, spec: Spec, name: str, dtype: torch.dtype | None, blank: bool = False, data: Iterable[Any] | None = None
) -> Adapter:
    """Build the ops of a new adapter and put them into the model, idle and frozen; `load` fills them with a file's tensors.

    Args:
        blank: the tensors will be overwritten: skip initialisers that read the base or the data, or draw random numbers.
        data: see `attach`.
    """
    model = unwrap(model)
    spec, _ = as_spec(spec, {})
    spec.validate()
    check_free(model, name)
    spec = settled(spec, model)
    placed = [(part, part.sites(model)) for part in spec.parts()]
    for part, sites in placed:
        if not sites and not part.optional:
            where = f"targets={part.targets!r}"
            raise TargetError(f"{type(part).__name__} finds no place for itself", where=where, hint="name other modules with targets=")
        if dead := part.check_all(sites):
            raise SpecError("; ".join(dead), where=f"{type(part).__name__}(...)", hint="a module's path, a suffix of it, a glob or a regex on it")
    for site in (site for _, sites in placed for site in sites):
        problem = site.kind.problem(site.module)
        if problem:
            raise SiteError(problem, where=str(site), hint=f"leave it out with exclude={(_short(site.path),)!r}")
    wrong = [(str(site), p) for part, sites in placed for site in sites for p in part.check(site)]
    if wrong:
        first = {p: site for site, p in reversed(wrong)}  # each reason once, with the first place it holds for
        reasons = list(dict.fromkeys(p for _, p in wrong))[:4]
        raise SpecError(
            f"{type(spec).__name__} does not fit {len({site for site, _ in wrong})} of {sum(len(sites) for _, sites in placed)} sites: "
            + "; ".join(reasons),
            where="; ".join(dict.fromkeys(first[p] for p in reasons)),
            hint="name other modules with targets=, or leave these out with exclude=",
        )
    if not blank and placed[0][1][0].device.type != "meta":
        _check_data(spec, data)
    made = []
    for i, (part, sites) in enumerate(placed):
        shared: dict[str, Any] = {}
        part.prepare(sites, shared)
        if part.wants_data() and not blank and sites[0].device.type != "meta":
            assert data is not None, "_check_data has checked it"
            sites = part.study(model, sites, data, shared)
        made += [(site, "", part.make(site.for_build(dtype, blank, shared), i)) for site in sites]
    return install(model, name, spec, made)


def _short(path: str) -> str:
    """Return the last name of a path, which means its siblings in the other blocks as well; the whole path where that is a number."""
    last = path.rpartition(".")[2]
    return path if last.isdigit() else last


def _check_data(spec: Spec, data: Iterable[Any] | None) -> None:
    wants = any(part.wants_data() for part in spec.parts())
    if wants and data is None:
        raise SpecError(
            f"this {type(spec).__name__} starts from data, and none was given",
            where=f"{type(spec).__name__}(...)",
            hint="st.attach(model, spec, data=batches) with a few batches as the model takes them, such as a DataLoader of your data",
        )
    if data is not None and not wants:
        raise SpecError(
            f"this {type(spec).__name__} does not start from data, so data= would not be looked at",
            where=f"{type(spec).__name__}(...)",
            hint='leave data= out, or ask for an initialiser that takes it: st.LoRA(init="eva")',
        )


@shows('st.detach(model, "a"): the name of an adapter, of st.adapters(model)')
def detach(model: nn.Module, name: str) -> None:
    """Remove an adapter; with the last one gone the model has its very first classes again.

    Raises:
        NoSuchAdapter: no adapter has this name.
        MergeError: it is merged now.
    """
    model = unwrap(model)
    state = state_of(model)
    adapter = state.adapter(name)
    if state.merged and state.merged_plan is not None and name in state.merged_plan.names:
        hint = "st.unmerge(model) first; or keep it in the weights for good, without adapters: st.merge(model, keep=False)"
        raise MergeError(f"{name!r} is merged into the weights now", hint=hint)
    uninstall(model, state, adapter)


class Use:
    """What `use` returns: nothing to do to keep its effect; in a `with` statement the effect ends with the block.

    It carries its plan: called, it runs the model under it in any thread, where a block of another thread does not show.

    Example:
        >>> with st.use(model, "support") as support:  # doctest: +SKIP
        ...     Thread(target=support.generate, kwargs=batch).start()
    """

    def __init__(self, model: nn.Module, state: State, plan: Plan, before: dict[str, bool]) -> None:
        self._model, self._state, self._plan, self._before = model, state, plan, before
        self._leave: list[Callable[[], None]] = []

    def __enter__(self) -> Use:
        self._state.withdraw(self)
        for name, live in self._before.items():
            if name in self._state.adapters:
                self._state.adapters[name].set_live(live)
        self._before = {}
        self._leave.append(self._state.enter(self._plan, opener(1)))
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward under this plan."""
        return self.run(self._model, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's `generate` under this plan."""
        return self.run(self._model.generate, *args, **kwargs)  # type: ignore[arg-type]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a function returns under this plan.

        Raises:
            NoSuchAdapter, MergeError: an adapter of the plan has gone, or something is merged.
        """
        self._state.check(self._plan)
        if self._state.merged:
            raise MergeError("an adapter is merged into the weights now", hint="st.unmerge(model) first")
        leave = self._state.enter(self._plan)
        try:
            return function(*args, **kwargs)
        finally:
            leave()

    def __exit__(self, *exc: object) -> None:
        self._leave.pop()()


class _Unsaid:
    def __repr__(self) -> str:
        return "..."


UNSAID: Any = _Unsaid()


def use(model: nn.Module, which: Which = UNSAID, *, rows: Sequence[Which] | None = None) -> Use:
    """Say which adapters act: from now on, or, as a context manager, inside the block only.

    Args:
        model: a model with adapters.
        which: what acts: a name; a list (a stack: the first acts first); a mapping name -> weight (a weighted sum); None (the bare base).
        rows: instead of `which`: one such entry for each row of the batch.

    A call outside `with` also makes the named adapters trainable (unless loaded with trainable=False) and freezes the others. Inside
    `with`, gradients stay as `trainable` or the last plain `use` left them, so that threads do not disturb each other.

    Raises:
        NoSuchAdapter, PlanError: unknown names, or a plan that cannot be read.
        MergeError: something is merged into the weights.

    Example:
        >>> with st.use(model, rows=["support", None, {"a": 0.7, "b": 0.3}]):  # doctest: +SKIP
        ...     model(**batch_of_three)
    """
    state = state_of(model)
    if rows is None and which is UNSAID:
        first = next(iter(state.adapters), "default")
        raise PlanError(
            "use needs to know what to use",
            where=f"attached: {', '.join(state.adapters) or 'none'}",
            hint=f"st.use(model, {first!r}); st.use(model, None) for the bare base",
        )
    plan = Plan.of(which) if rows is None else Plan.of_rows(rows)
    if rows is not None and which is not UNSAID and which is not None:
        raise SpecError("use takes either one plan or rows=, not both", hint='st.use(model, rows=["a", None])')
    state.check(plan)
    check_routed(state, plan)
    if state.merged:
        raise MergeError("an adapter is merged into the weights now", hint="st.unmerge(model) first")
    before = {}
    for name, adapter in state.adapters.items():
        live = name in plan.names and adapter.trainable
        if live != adapter.live:
            before[name] = adapter.live
            adapter.set_live(live)
    handle = Use(model, state, plan, before)
    state.set_default(plan, handle)
    return handle


class disabled:
    """Context manager: the bare base, also when something is merged; afterwards everything is as before.

    Example:
        >>> with st.disabled(model):  # doctest: +SKIP
        ...     reference = model(**batch).logits
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._state = state_of(model)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> disabled:
        if self._state.merged:
            from slimtune.algebra.merge import lifted

            self._undo.append(lifted(self._model))
        self._undo.append(self._state.enter(Plan.of(None), opener(1)))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()


def trainable(model: nn.Module, names: str | Iterable[str]) -> None:
    """Make just these adapters trainable, whichever act now (to train several in one mixed batch).

    Parameters that you froze by hand stay frozen, as under `use`; an adapter that you froze altogether trains again.

    Raises:
        NoSuchAdapter: a name is unknown.
    """
    state = state_of(model)
    wanted = {names} if isinstance(names, str) else set(names)
    for name in wanted:
        adapter = state.adapter(name)
        adapter.trainable = True
        adapter.thaw()
    for name, adapter in state.adapters.items():
        adapter.set_live(name in wanted)


def report(model: nn.Module, name: str | None = None) -> Report:
    """Return the report of an adapter (default: the one in use, else the newest).

    Raises:
        NoSuchAdapter, SiteError: no such adapter; nothing attached.
    """
    model = unwrap(model)
    state = state_of(model)
    if name is None:
        active = [n for n in state.adapters if n in state.current().names]
        name = active[0] if active else list(state.adapters)[-1]
    return make_report(model, state.adapter(name))


@shows("st.param_groups(model, lr=1e-4)")
def param_groups(
    model: nn.Module, *, lr: float, up_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimiser groups of every trainable parameter, by role.

    Args:
        lr: learning rate.
        up_ratio: learning rate of "up" factors (LoRA's B) over `lr`; 16 is LoRA+ (arXiv 2402.12354).
        weight_decay: of "down", "up", "core" and "dense" tensors; gains and biases get none.
    """
    if state_of(model).merged:
        raise MergeError("an adapter is merged into the weights now, so its parameters get no gradient", hint="st.unmerge(model) first")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for adapter in state_of(model).adapters.values():
        for op in adapter.ops.values():
            for role, p in roles_of(op):
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    rate = lr * up_ratio if role == "up" else lr
                    decay = 0.0 if role in {"bias", "gain"} else weight_decay
                    groups.setdefault((rate, decay), []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def roles_of(op: Op) -> list[tuple[str, nn.Parameter]]:
    """Return (role, parameter) of every parameter of an op and of the ops inside it; one without a declared role counts as "core"."""
    by_id = {id(t): part.roles[name] for part in op.modules() if isinstance(part, Op) for name, t in part.tensors()}
    return [(by_id.get(id(p), "core"), p) for p in op.parameters()]


def keep_plan(model: nn.Module, checkpoint: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return a checkpoint function that recomputes under the plan of the first run, for hand-written checkpointing.

    `model.gradient_checkpointing_enable()` of transformers needs no such call.

    Args:
        checkpoint: the function that is called; default: torch.utils.checkpoint.checkpoint.

    Example:
        >>> checkpoint = st.keep_plan(model)  # doctest: +SKIP
        >>> y = checkpoint(block, x, use_reentrant=False)  # doctest: +SKIP
    """
    from torch.utils.checkpoint import checkpoint as of_torch  # older versions of torch import it on demand, with sympy

    return KeepPlan(state_of(model), of_torch if checkpoint is None else checkpoint)
