"""The properties of running, merging and keeping an adapter. Each takes a Subject and raises AssertionError when it does not hold.

Where a method lacks the capability a property needs, the property is that asking for it raises our own error.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import CapabilityError, MergeError, NoSuchAdapter, PlanError, SlimtuneError
from slimtune.core.fold import first_tensor
from slimtune.core.op import Op, affine
from slimtune.core.plan import Which
from slimtune.core.spec import Spec
from slimtune.core.targets import kind_of
from slimtune.ports.group_quantised import GroupLinear
from slimtune.testing.by_hand import with_prompts
from slimtune.testing.subject import Subject, adapter_of, bits, classes, close, differ, refused, run, state
from slimtune.testing.textbook import with_prefixes

Property = Callable[[Subject], None]
PROPERTIES: dict[str, Property] = {}
COMPILED: dict[str, Property] = {}  # costs a second or two: for each method on one model
EVERY_PLAN: dict[str, Property] = {}  # costs many seconds: on request


def prop(name: str, table: dict[str, Property] = PROPERTIES) -> Callable[[Property], Property]:
    """Register a property under a readable name."""

    def wrap(fn: Property) -> Property:
        table[name] = fn
        return fn

    return wrap


@prop("identity at the start")
def identity(s: Subject) -> None:
    """A new adapter changes nothing, or exactly what `spec.expected_start(model, inputs)` says."""
    model = s.case.build()
    base, keys, kinds = s.out(model), list(model.state_dict()), classes(model)
    report = st.attach(model, s.placed(), name="a")
    start = getattr(s.spec, "expected_start", None)
    want = base if start is None else start(s.case.build(), s.case.inputs())
    s.close(s.out(model), want, "output right after attach", 1e-12 if s.case.dtype == torch.float64 else 1e-6)
    assert report.rows, "the report lists no op"
    assert report.trainable > 0, "nothing trains"
    assert report.trainable == sum(p.numel() for p in set(model.parameters()) if p.requires_grad), "the report's count is wrong"
    assert list(base_state_dict(model)) == keys, "the base's state dict changed"
    for path, cls in kinds.items():
        module = model.get_submodule(path)
        assert isinstance(module, cls), f"{path} is no {cls.__name__} any more"
        assert type(module).__name__ == cls.__name__, f"{path} changed its class name"


@prop("the spec survives JSON")
def json_round_trip(s: Subject) -> None:
    spec = s.placed()
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@prop("disabled = base")
def disabled(s: Subject) -> None:
    base = s.out(s.case.build())
    model = s.attached("a", "b")
    out = s.out(model)
    differ(out, base, "a random adapter")
    with st.disabled(model):
        s.same(s.out(model), base, "disabled is not the base")
        with st.use(model, "a"):
            s.out(model)
        with st.disabled(model):
            s.same(s.out(model), base, "disabled twice is not the base")
        s.same(s.out(model), base, "the inner block leaked")
    s.same(s.out(model), out, "not as before after `disabled`")
    st.use(model, None)
    s.same(s.out(model), base, "use(None) is not the base")
    if s.can_merge(model):
        st.merge(model, "b")
        merged = s.out(model)
        with st.disabled(model):
            s.same(s.out(model), base, "disabled is not the base while merged")
        s.same(s.out(model), merged, "not merged as before after `disabled`")


@prop("merge = forward")
def merge(s: Subject) -> None:
    model = s.attached("a", "b")
    st.use(model, "a")
    out, before = s.out(model), bits(model)
    if not s.can_merge(model):
        with refused(CapabilityError, what="merging a method without exact weights", place=True):
            st.merge(model, "a")
        assert bits(model) == before, "the refused merge changed the base"
        s.same(s.out(model), out, "the refused merge changed the model")
        return
    want = merged_twin(s, model) if s.case.quantised else out
    st.merge(model)
    s.close(s.out(model), want, "merged output")
    differ(s.out(model), s.out(s.case.build()), "merge")
    with refused(MergeError, what="merging twice"):
        st.merge(model, "b")
    with refused(MergeError, what="using an adapter while merged"):
        st.use(model, "b")
    assert bits(model) != before, "merging changed no weight"
    st.unmerge(model)
    if not s.case.quantised:
        for which in (["a", "b"], {"a": 0.7, "b": -0.4}) if s.can_sum(model) else (["a", "b"],):
            with st.use(model, which):
                want = s.out(model)
            st.merge(model, which)
            s.close(s.out(model), want, f"merged output of {which}")
            st.unmerge(model)


def merged_twin(s: Subject, model: nn.Module) -> Tensor:
    """Return the output of a fresh quantised module made from the dense merged weights: what merging into 4 or 8 bits must give."""
    ops = list(s.ops(model, "a").values())
    weight, bias = dense_after(model.get_submodule("body"), ops)
    fresh = s.case.build()
    if any(hasattr(op, "weight") for op in ops):
        requantise(fresh, weight, bias)
    elif bias is not None:
        fresh.get_submodule("body").bias = nn.Parameter(bias, requires_grad=False)
    return s.out(fresh)


def requantise(model: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Put a module quantised anew from a dense weight into a quantised case's model, with nothing but the quantising library itself."""
    old: Any = model.get_submodule("body")
    b, a = weight.shape
    if isinstance(old, GroupLinear):
        plain: Any = nn.Linear(a, b, bias=bias is not None)
        plain.weight = nn.Parameter(weight.detach().clone())
        plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        model.body = GroupLinear(plain, old.group).eval()
        return
    bnb: Any = importlib.import_module("bitsandbytes")
    if isinstance(old, bnb.nn.Linear4bit):
        kind = old.weight.quant_state.quant_type
        new: Any = bnb.nn.Linear4bit(a, b, bias=bias is not None, quant_type=kind, compute_dtype=old.compute_dtype)
        new.support_avx512bf16_for_cpu = False  # as in the case itself
        new.weight = bnb.nn.Params4bit(weight.detach().clone(), requires_grad=False, quant_type=kind)
    else:
        new = bnb.nn.Linear8bitLt(a, b, bias=bias is not None, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    model.body = new.to("cpu").eval()


def dense_after(module: nn.Module, ops: list[Any], param: str = "weight") -> tuple[Tensor, Tensor | None]:
    """Return weight and bias after applying the exact forms of ops one after another."""
    kind = kind_of(module)
    assert kind is not None
    with torch.no_grad():
        W, b = kind.read(module, param), kind.bias(module, param)
        work = torch.float64 if W.dtype == torch.float64 else torch.float32
        W, b = W.to(work), None if b is None else b.to(work)
        for op in ops:
            if op.param != param:
                continue
            old = b
            if hasattr(op, "bias"):
                b = op.bias(old)
            if hasattr(op, "weight"):
                W = op.weight(W)
    return W, b


@prop("unmerge restores the bits")
def unmerge(s: Subject) -> None:
    for dtype in (None,) if s.case.quantised else (torch.bfloat16, None):
        model = s.attached("a", dtype=dtype)
        before, out = bits(model), s.out(model, dtype=dtype)
        objects = dict(model.named_parameters())
        if not s.can_merge(model):
            with refused(MergeError, what="unmerging when nothing is merged"):
                st.unmerge(model)
            return
        for _ in range(2):
            st.merge(model)
            for key, p in model.named_parameters():
                if ".slim." not in f".{key}":
                    assert torch.isfinite(p.float()).all() or not p.is_floating_point(), f"{key} is not finite after merging"
            st.unmerge(model)
        assert bits(model) == before, f"unmerge does not restore the bits of a {dtype or s.case.dtype} base"
        assert all(objects[key] is p for key, p in model.named_parameters()), "unmerge does not restore the parameter objects"
        s.same(s.out(model, dtype=dtype), out, "the output is another one after unmerge")


@prop("detach restores classes and bits")
def detach(s: Subject) -> None:
    fresh = s.case.build()
    model = s.attached("a", "b")
    st.use(model, "a")
    alone = s.out(model)
    st.detach(model, "b")
    s.same(s.out(model), alone, "detaching one adapter changed another")
    st.detach(model, "a")
    assert classes(model) == classes(fresh), "classes differ after detach"
    assert bits(model) == bits(fresh), "bits differ after detach"
    assert torch.equal(s.out(model), s.out(fresh)), "output differs after detach"
    assert not [p for p, m in model.named_modules() if "slim" in p.split(".") or "slim_state" in m.__dict__], "something is left behind"


@prop("saved and loaded: same output, same bytes")
def files(s: Subject) -> None:
    model = s.attached("a", "b")
    st.use(model, "a")
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "one"), Path(folder, "two")
        st.save(model, first, name="a")
        other = s.case.build()
        st.load(other, first, name="a", trainable=True)
        s.same(s.out(other), s.out(model), "output after loading")
        assert adapter_of(other, "a").spec.method == s.spec.method, "the loaded adapter is of another method"
        for (path, key), op in adapter_of(model, "a").ops.items():
            again = adapter_of(other, "a").ops[(path, key)]
            for (role, t), (_, u) in zip(op.tensors(), again.tensors(), strict=True):
                assert t.dtype == u.dtype, f"{path}: {role} changed its dtype"
                close(u, t, f"{path}: {role}", 32 * torch.finfo(t.dtype).eps)  # a dense delta is kept as W + D; the bytes below are exact
        st.save(other, second, name="a")
        names = sorted(p.name for p in first.iterdir())
        assert names == sorted(p.name for p in second.iterdir())
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), f"{name}: saving again what was loaded gives other bytes"
        served = s.case.build()
        st.load(served, first, name="a")
        assert not any(p.requires_grad for p in adapter_of(served, "a").parameters()), "loaded for serving, yet it trains"


@prop("copies")
def copies(s: Subject) -> None:
    """deepcopy and pickle give an equal, independent model."""
    model = s.attached("a", "b")
    st.use(model, "a")
    out = s.out(model)
    for how, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        s.same(s.out(twin), out, f"the {how} gives another output")
        assert classes(twin).keys() == classes(model).keys()
        st.use(twin, None)
        s.same(s.out(model), out, f"the {how} shares its plan with the original")
        with torch.no_grad():
            for p in adapter_of(twin, "a").parameters():
                p.zero_()
        s.same(s.out(model), out, f"the {how} shares tensors with the original")
        st.detach(twin, "a")
        st.detach(twin, "b")
        assert classes(twin) == classes(s.case.build()), f"the {how} does not detach cleanly"


@prop("stack")
def stack(s: Subject) -> None:
    """A stack equals its adapters one after the other, worked out by hand."""
    by_hand(s, ["a", "b"])
    by_hand(s, ["b", "a"])


@prop("weighted sum")
def weighted_sum(s: Subject) -> None:
    """A weighted sum equals the base plus the weighted changes, worked out by hand."""
    model = s.attached("a", "b")
    if not s.can_sum(model):
        with refused(CapabilityError, what="a weighted sum of ops that replace the output", place=True), st.use(model, {"a": 0.5, "b": 0.5}):
            s.out(model)
        return
    by_hand(s, {"a": 0.7, "b": -0.4})
    by_hand(s, {"a": 1.0})


def by_hand(s: Subject, which: Which) -> None:
    """Compare a plan with its effect worked out at every site from what the site was given."""
    model = s.attached("a", "b")
    seen: list[tuple[nn.Module, tuple[object, ...], dict[str, object], Tensor, dict[str, Tensor]]] = []
    entered: dict[str, Tensor] = {}  # entrance -> the last input it got, for ops that read another module's input

    def enter(path: str) -> Callable[..., None]:
        return lambda m, args, kw: entered.update({path: args[0] if args else next(iter(kw.values()))})

    hooks = [
        m.register_forward_hook(lambda m, args, kw, out: seen.append((m, args, kw, first_tensor(out), dict(entered))), with_kwargs=True)
        for m in model.modules()
        if "slim" in m._modules
    ]
    for path in {op.entrance for name in which for op in s.ops(model, name).values() if op.entrance}:  # type: ignore[union-attr]
        hooks.append(model.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True))
    with st.use(model, which):
        out = s.out(model)
    for hook in hooks:
        hook.remove()
    assert seen, "no adapted module was called"
    differ(out, s.out(s.case.build()), f"use({which})")
    for module, args, kwargs, got, inputs in seen:
        with torch.no_grad():
            want = folded(s, model, module, args, kwargs, which, inputs)
        s.close(got, want, f"use({which}) at {module.slim.path}", 3e-3 if s.case.name == "int8" else None)  # type: ignore[union-attr]


def folded(
    s: Subject, model: nn.Module, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], which: Which, inputs: dict[str, Tensor]
) -> Tensor:
    """Return what a site must give under a plan: through dense weights where all ops have them, else op by op.

    Args:
        inputs: what the entrances that ops read elsewhere were given.
    """
    names = list(which)  # type: ignore[arg-type]
    mine = [op for name in names for op in module.slim.ops(name)]  # type: ignore[union-attr, operator]
    kind = module.slim.kind  # type: ignore[union-attr]
    if all(hasattr(op, "weight") or hasattr(op, "bias") for op in mine) and not s.case.quantised:
        return through_weights(model, module, args, kwargs, which, lambda op: True)
    prefixed = any(op.port == "attention" or (op.port == "stream" and not op.tokens) for op in mine)
    if any(op.port in {"stream", "reader"} and op.tokens for op in mine):
        with st.disabled(model):
            return with_prompts(model, module, args, kwargs, which)
    with st.disabled(model):
        x: Tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        inside = kind.name in {"attention", "experts"}  # there weight ops act on what is computed inside, the others on the output
        if prefixed:
            y = with_prefixes(model, module, args, kwargs, which)
        else:
            y = through_weights(model, module, args, kwargs, which, at_weights) if inside else first_tensor(module(*args, **kwargs))
        # a layer in 8 bits rounds what it is given, so it is not called a second time
        if s.case.quantised and any(hasattr(op, "enter") for op in mine) and all(affine(op) for op in mine):
            return replayed(module, mine, which, x)

        def after(base: Callable[[Tensor], Tensor], ops: list[Any]) -> Callable[[Tensor], Tensor]:
            """Return a map after ops have acted on it, one by one."""
            for i, op in enumerate(ops):
                if op.port == "output" or not (inside or prefixed):
                    base = functools.partial(acted, module, op, base, [[(o, None)] for o in ops[:i]], inputs)
            return base

        def plain(v: Tensor) -> Tensor:
            return y if v is x else first_tensor(module(v))

        if isinstance(which, dict):
            return y + sum(w * (after(plain, module.slim.ops(name))(x) - y) for name, w in which.items())
        return after(plain, mine)(x)


def acted(module: Any, op: Any, base: Callable[[Tensor], Tensor], before: Any, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what one op makes of a map at x."""
    y = base(op.enter(x, module) if hasattr(op, "enter") else x)
    if hasattr(op, "turn"):
        turned: Tensor = op.turn(x, y, module, before)
        return turned
    return y + op.run(inputs[op.entrance] if op.entrance else x, y, module) if hasattr(op, "run") else y


def at_weights(op: Op) -> bool:
    return op.port == "weight"


def through_weights(
    model: nn.Module, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], which: Which, keep: Callable[[Op], bool]
) -> Tensor:
    """Return the output of a module whose weights are those that a plan's ops make of them, the ops that are to be kept."""
    kind, undo = module.slim.kind, []
    ops = {name: [op for op in module.slim.ops(name) if keep(op)] for name in which}  # type: ignore[union-attr]
    for param in kind.names(module):
        W, b = dense_after(module, [], param)
        if isinstance(which, dict):
            W0, b0 = W, b
            for name, w in which.items():
                W1, b1 = dense_after(module, ops[name], param)
                W = W + w * (W1 - W0)
                if b1 is not None:
                    zero = torch.zeros_like(b1)
                    b = (zero if b is None else b) + w * (b1 - (zero if b0 is None else b0))
        else:
            W, b = dense_after(module, [op for found in ops.values() for op in found], param)
        undo.append(kind.write(module, param, W, b))
    with st.disabled(model):
        want = first_tensor(module(*args, **kwargs))
    for step in reversed(undo):
        step()
    return want


def replayed(module: nn.Module, ops: list[Op], which: Which, x: Tensor) -> Tensor:
    """Return the output of a quantised linear map under ops with exact forms, through its dequantised weight."""
    W0, b0 = dense_after(module, [])
    if isinstance(which, dict):
        W, b = W0, b0
        for (_, w), op in zip(which.items(), ops, strict=True):
            W1, b1 = dense_after(module, [op])
            W = W + w * (W1 - W0)
            b = b if b is None or b1 is None or b0 is None else b + w * (b1 - b0)
    else:
        W, b = dense_after(module, ops)
    return torch.nn.functional.linear(x, W, b)


@prop("mixed rows = each row alone")
def rows(s: Subject) -> None:
    model = s.attached("a", "b")
    plan: list[Which] = ["a", None, "b", ["a", "b"], "a"]
    if s.can_sum(model):
        plan += [{"a": 0.5, "b": 0.25}]
    inputs = s.case.inputs(len(plan))
    if not s.case.rows:
        with refused(PlanError, what="rows= where rows cannot be told apart", place=True), st.use(model, rows=plan):
            run(model, inputs)
        return
    with torch.no_grad(), st.use(model, rows=plan):
        mixed = run(model, inputs)
    seen = []
    for i, which in enumerate(plan):
        with torch.no_grad(), st.use(model, which):
            alone = run(model, s.case.one(inputs, i))
        s.close(s.case.row(mixed, i), alone, f"row {i} ({which})")
        seen.append(alone)
    with refused(PlanError, what="a plan for another number of rows", place=True), st.use(model, rows=plan[:-1]):
        run(model, inputs)


@prop("mixed rows train")
def rows_train(s: Subject) -> None:
    """The gradients of a mixed batch are the sums of those of its rows."""
    if not s.case.rows:
        return rows(s)
    model = s.attached("a", "b")
    st.trainable(model, ["a", "b"])
    plan: list[Which] = ["a", None, "b", "a"]
    inputs = s.case.inputs(len(plan))
    params = [*dict.fromkeys([*adapter_of(model, "a").parameters(), *adapter_of(model, "b").parameters()])]
    with st.use(model, rows=plan):
        out = run(model, inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    mixed = torch.autograd.grad((out * weights).sum(), params, allow_unused=True)
    total = [torch.zeros_like(p) for p in params]
    for i, which in enumerate(plan):
        if which is None:
            continue
        with st.use(model, which):
            alone = run(model, s.case.one(inputs, i))
        found = torch.autograd.grad((alone * s.case.row(weights, i)).sum(), params, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
    biggest = max(t.abs().max() for t in total)
    assert biggest > 0, "no gradient at all"
    for g, t in zip(mixed, total, strict=True):
        close(torch.zeros_like(t) if g is None else g, t, "gradient of a mixed batch", max(s.case.rtol, 1e-9) * 10)
    return None


@prop("contexts and errors")
def contexts(s: Subject) -> None:
    """Blocks nest, an error inside leaves nothing behind, and unknown names are our own error."""
    model = s.attached("a", "b")
    alone = {}
    for which in ("a", "b", None):
        with st.use(model, which):
            alone[which] = s.out(model)
    st.use(model, "a")
    with st.use(model, "b"):
        with st.use(model, None):
            s.same(s.out(model), alone[None], "the plan in force")
        s.same(s.out(model), alone["b"], "the plan in force")
        try:
            with st.use(model, "a"):
                raise KeyError
        except KeyError:
            pass
        s.same(s.out(model), alone["b"], "the plan in force")
    s.same(s.out(model), alone["a"], "the plan in force")
    with refused(NoSuchAdapter, what="an unknown adapter"):
        st.use(model, "nobody")
    with refused(SlimtuneError, what="a name in use"):
        st.attach(model, s.placed(), name="a")
    assert len(state(model).adapters) == 2
