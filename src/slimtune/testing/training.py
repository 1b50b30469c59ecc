"""The properties of training: gradients, dtypes, who trains, checkpointing, and compiled models."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune as st
from slimtune.core.op import Op
from slimtune.core.plan import Which
from slimtune.core.targets import kind_of
from slimtune.testing.properties import COMPILED, EVERY_PLAN, prop
from slimtune.testing.subject import Subject, adapter_of, close, fill, gradients, run, same_gradients


def loss_of(out: Tensor) -> Tensor:
    """Return a loss whose gradient differs in every entry of the output."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    return (out.double() * weights).sum() + 0.1 * out.double().square().sum()


@prop("only the active adapter trains")
def only_active(s: Subject) -> None:
    model = s.attached("a", "b")
    st.use(model, "a")
    kept = {key: p.detach().clone() for key, p in model.named_parameters()}
    mine = {id(p) for p in adapter_of(model, "a").parameters()}
    asked = {id(p) for p in model.parameters() if p.requires_grad}
    assert asked == mine, "requires_grad is not set on exactly the active adapter's parameters"
    groups = st.param_groups(model, lr=0.1, weight_decay=0.01)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter stands in two groups"
    assert set(grouped) == mine, "param_groups is not exactly what trains"
    optimiser = torch.optim.SGD(groups)
    torch.autograd.backward(loss_of(run(model, s.case.inputs())))
    for (path, key), op in adapter_of(model, "a").ops.items():
        params = list(op.parameters())
        assert not params or any(p.grad is not None and p.grad.abs().max() > 0 for p in params), f"no gradient reaches {path} ({key})"
    optimiser.step()
    for key, p in model.named_parameters():
        if id(p) not in mine:
            assert p.grad is None, f"{key} got a gradient"
            assert torch.equal(p, kept[key]), f"{key} changed"
    st.use(model, "b")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter_of(model, "b").parameters()}


@prop("fp64 gradcheck")
def gradcheck(s: Subject) -> None:
    """Gradients of parameters and inputs equal finite differences; on a quantised base, those of its dequantised twin."""
    model = s.attached("a")
    inputs = s.case.inputs(2)
    params = list(dict.fromkeys(adapter_of(model, "a").parameters()))
    if s.case.quantised:
        return against_twin(s, model)
    for t in inputs[:1]:
        if t.is_floating_point():
            t.requires_grad_(True)
    leaves = [*(t for t in inputs if t.requires_grad), *params]

    def call(*_: Tensor) -> Tensor:
        return run(model, inputs)  # gradcheck perturbs the leaves in place

    tol = max(1e-6, s.case.step)
    with contextlib.ExitStack() as held:
        for module in model.modules():
            if isinstance(module, Op) and hasattr(module, "hold"):
                held.enter_context(module.hold())  # type: ignore[operator]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_undefined_grad=False, eps=s.case.step, atol=tol, rtol=max(tol, 1e-3))
    return None


def against_twin(s: Subject, model: nn.Module) -> None:
    body = model.get_submodule("body")
    kind = kind_of(body)
    assert kind is not None
    with torch.no_grad():
        W, b = kind.read(body, "weight"), kind.bias(body, "weight")
    twin = s.case.build()
    plain = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    with torch.no_grad():
        plain.weight.copy_(W)
        if b is not None:
            plain.bias.copy_(b)
    twin.body = plain
    s.attached("a", model=twin, busy=False)
    for (key, op), other in zip(adapter_of(model, "a").ops.items(), adapter_of(twin, "a").ops.values(), strict=True):
        assert op.state_dict().keys() == other.state_dict().keys(), f"{key}: another op on a quantised base"
        other.load_state_dict(op.state_dict())
    rtol = 5e-2 if s.case.name == "int8" else 1e-4  # an 8-bit layer rounds the activations, too
    found = []
    for m in (model, twin):
        (x,) = s.case.inputs()
        x.requires_grad_(True)
        out = run(m, (x,))
        torch.autograd.backward(loss_of(out))
        found.append((out, x.grad, gradients(m, "a")))
    close(found[0][0], found[1][0], "output against the dequantised twin", rtol)
    close(found[0][1], found[1][1], "gradient of the input against the dequantised twin", rtol)  # type: ignore[arg-type]
    same_gradients(found[0][2], found[1][2], "gradients against the dequantised twin", rtol)


@prop("bf16 base trains")
def bf16(s: Subject) -> None:
    """On a bfloat16 (or quantised) base the parameters are float32, everything stays finite, and the loss falls."""
    losses = descent(s, 1e-2)
    if losses[-1] >= 0.999 * losses[0]:
        losses = descent(s, 3e-3)  # a network in front of what it makes takes smaller steps
    assert losses[-1] < 0.999 * losses[0], f"the loss does not fall: {losses}"


def descent(s: Subject, lr: float) -> list[float]:
    """Return the losses of a few steps on a bfloat16 base."""
    dtype = torch.bfloat16
    model = s.attached("a", dtype=dtype, busy=False)
    adapter = adapter_of(model, "a")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}, "the parameters are not float32"
    inputs = s.case.inputs(dtype=dtype)
    with torch.no_grad():
        wanted = 1.25 * run(model, inputs).float() + 0.5  # a bias can go part of the way, and so can any other op
    optimiser = torch.optim.Adam(st.param_groups(model, lr=lr))
    losses = []
    for _ in range(8):
        out = run(model, inputs)
        assert out.dtype == dtype, f"the output became {out.dtype}"
        loss = (out.float() - wanted).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in adapter.parameters()), "a gradient is not finite"
        optimiser.step()
    assert all(torch.isfinite(p).all() for p in adapter.parameters()), "a parameter is not finite"
    return losses


@prop("gradient checkpointing")
def checkpointing(s: Subject) -> None:
    """Both kinds give the gradients of a plain run, with backward inside the block and outside of it."""
    model = s.attached("a", "b")
    inputs = s.case.inputs()
    st.trainable(model, ["a"])
    st.use(model, "b")
    st.trainable(model, ["a"])
    with st.use(model, "a"):
        torch.autograd.backward(loss_of(run(model, inputs)))
    want = gradients(model, "a")
    keep = st.keep_plan(model, checkpoint)
    own = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_enable"
    for reentrant in (True, False):
        for outside in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with st.use(model, "a"):
                    if hasattr(model, own):
                        model.train()
                        getattr(model, own)({"use_reentrant": reentrant})
                        out = run(model, inputs)
                    else:
                        # the reentrant kind needs one input that asks for gradients, as hidden states do in a real model
                        spark = torch.zeros((), requires_grad=True)
                        out = keep(lambda _, *a: run(model, a), spark, *inputs, use_reentrant=reentrant)
                    if not outside:
                        torch.autograd.backward(loss_of(out))
                if outside:
                    torch.autograd.backward(loss_of(out))
            what = f"checkpointing, use_reentrant={reentrant}, backward {'outside' if outside else 'inside'} the block"
            same_gradients(gradients(model, "a"), want, what, max(s.case.rtol, 1e-9))
            assert all(g is None for g in gradients(model, "b")), "the idle adapter got gradients"


class Counted:
    """A compile backend that runs the graph as it is and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return graph


@prop("compiled as one graph", COMPILED)
def compiled(s: Subject) -> None:
    """torch.compile(fullgraph=True) of a mixed batch: same outputs and gradients; new values or weights do not compile again."""
    model = s.attached("a", "b")
    inputs = s.case.inputs()
    counted = Counted()
    torch._dynamo.reset()
    fast: Any = torch.compile(model, fullgraph=True, backend=counted)

    def compare(w: float) -> None:
        mix: Which = {"a": w, "b": 0.3} if s.can_sum(model) else ["a", "b"]
        plan = st.use(model, rows=["a", None, mix, "a"]) if s.case.rows else st.use(model, mix)
        with plan:
            st.trainable(model, ["a", "b"])
            want, got = run(model, inputs), run(fast, inputs)
            torch.autograd.backward(loss_of(want))
            wanted = gradients(model, "a") + gradients(model, "b")
            torch.autograd.backward(loss_of(got))
        s.close(got.detach(), want.detach(), "compiled output")
        same_gradients(gradients(model, "a") + gradients(model, "b"), wanted, "compiled gradients", max(s.case.rtol, 1e-9))

    compare(0.5)
    assert counted.graphs == 1, f"one graph was asked for, {counted.graphs} were made"
    fill(model, "a")
    compare(0.5)
    assert counted.graphs == 1, "changing the adapter's values compiled again"
    for w in (0.1, -2.0):
        compare(w)
    assert counted.graphs == 1, "changing a weight compiled again"
    torch._dynamo.reset()


@prop("compiled, every plan", EVERY_PLAN)
def compiled_plans(s: Subject) -> None:
    """A compiled model follows `use`, `disabled`, merge and detach."""
    model = s.attached("a", "b")
    inputs = s.case.inputs()
    torch._dynamo.reset()
    fast: Any = torch.compile(model, fullgraph=True, backend=Counted())

    def compare(what: str) -> None:
        s.close(run(fast, inputs).detach(), run(model, inputs).detach(), f"compiled, {what}")

    for which in ("a", ["a", "b"], None, {"a": 0.5, "b": 0.3}) if s.can_sum(model) else ("a", ["a", "b"], None):
        st.use(model, which)
        compare(f"use({which})")
    st.use(model, "a")
    with st.disabled(model):
        compare("disabled")
    compare("after disabled")
    if s.can_merge(model):
        st.merge(model)
        compare("merged")
        st.unmerge(model)
        compare("unmerged")
    st.detach(model, "b")
    compare("one detached")
    torch._dynamo.reset()


__all__ = ["bf16", "checkpointing", "compiled", "compiled_plans", "gradcheck", "only_active"]
