"""What a cell of the table method x architecture checks. Each check takes a Bench, raises AssertionError when something does not hold, and
returns a limit: why a part of it is refused here by nature ("" if nothing is)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune as st
from slimtune.core.attach import roles_of
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import CapabilityError, PlanError
from slimtune.core.op import affine
from slimtune.core.plan import Which
from slimtune.core.spec import Spec
from slimtune.core.targets import heads, layer_of, matches
from slimtune.core.task_head import task_heads
from slimtune.testing.subject import adapter_of, bits, close, differ, fill, gradients, refused
from slimtune.testing.zoo import Architecture, Batch


@dataclass(frozen=True)
class Bench:
    """One method on one model."""

    spec: Spec
    model: Architecture

    def placed(self) -> Spec:
        """Return the spec, with the length of training where it asks for one (`scheduled(steps)`)."""
        spec: Spec = self.spec.scheduled(8) if hasattr(self.spec, "scheduled") else self.spec
        return spec

    def attached(self, *names: str, busy: bool = True) -> nn.Module:
        """Return a new model with adapters of these names, the last one in use; `busy` ones have random values."""
        model = self.model.build()
        with torch.random.fork_rng(devices=[]):
            for i, name in enumerate(names):
                torch.manual_seed(10 + i)
                st.attach(model, self.placed(), name=name)
                if busy:
                    fill(model, name)
        return model

    def out(self, model: nn.Module, n: int = 4) -> Tensor:
        with torch.no_grad():
            return self.model.run(model, self.model.inputs(n))

    def close(self, got: Tensor, want: Tensor, what: str) -> None:
        close(got, want, what, self.model.rtol)

    def same(self, got: Tensor, want: Tensor, what: str) -> None:
        """Assert that two runs of the same computation agree: up to the last bits, which follow from where tensors lie in memory."""
        close(got, want, what, 32 * torch.finfo(want.dtype).eps)


def loss_of(out: Tensor) -> Tensor:
    """Return a loss whose gradient differs in every entry of the output."""
    want = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (out - want).square().mean()


def start(b: Bench) -> str:
    """It lands on something, not on the head (unless that is its target, or the model classifies), and starts as the base.

    What a method with `expected_start` begins as is worked out by the conformance suite, on one model; here it begins the same each time.
    """
    model = b.model.build()
    base, keys, head = b.out(model), list(model.state_dict()), heads(model)
    report = st.attach(model, b.placed(), name="a")
    begun = b.out(model)
    if hasattr(b.spec, "expected_start"):
        again = b.model.build()
        st.attach(again, b.placed(), name="a")
        b.same(b.out(again), begun, "a second attach starts otherwise")
        assert begun.isfinite().all(), "the start is not finite"
    else:
        b.close(begun, base, "output right after attach")
    assert report.rows, "the report lists no op"
    assert report.trainable > 0, "nothing trains"
    assert report.trainable == sum(p.numel() for p in set(model.parameters()) if p.requires_grad), "the report's count is wrong"
    assert list(base_state_dict(model)) == keys, "the base's state dict changed"
    below = {id(p) for path, m in model.named_modules() if path not in head for p in m._parameters.values() if p is not None}
    taken = [row.path for row in report.rows if row.path in head]
    on_head = [path for path in taken if id(model.get_submodule(path)._parameters.get("weight")) not in below]  # a tied head may go along
    if not _trains_head(b.spec):
        assert set(on_head) == set(task_heads(model)), f"the head of a classifier, and no other, trains by default, not {on_head}"
    return ""


def _trains_head(spec: Spec) -> bool:
    return any("head" in (part.targets, part.train_modules) for part in spec.parts())


def learns(b: Bench) -> str:
    """One step of gradient descent changes the output and lowers the loss."""
    batch = b.model.inputs(4)
    share = 0.1  # of the loss that a step would take away if the loss were straight
    for _ in range(8):
        model = b.attached("a", busy=False)
        out = b.model.run(model, batch)
        loss = loss_of(out)
        loss.backward()
        params = [p for p in dict.fromkeys(adapter_of(model, "a").parameters()) if p.grad is not None]
        square = sum(float(p.grad.square().sum()) for p in params if p.grad is not None)
        assert square > 0, "no gradient reaches the adapter at its start"
        torch.optim.SGD(st.param_groups(model, lr=share * float(loss) / square)).step()
        with torch.no_grad():
            after = b.model.run(model, batch)
        if float(loss_of(after)) < float(loss):
            break
        share /= 4
    assert float(loss_of(after)) < float(loss), f"the loss does not fall: {float(loss)} -> {float(loss_of(after))}"
    assert not torch.equal(after, out), "the step changed nothing"
    return ""


def gradients_arrive(b: Bench) -> str:
    """Every parameter gets a gradient, except on modules whose output the model itself never reads."""
    model = b.attached("a")
    for p in model.parameters():
        p.requires_grad_(True)  # those of the base too: they tell what the model reads
    for seed in range(3):  # a unit that a threshold shuts off for one set of values is open for another
        loss_of(b.model.run(model, b.model.inputs(8))).backward()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20 + seed)
            fill(model, "a")
    unread = set()
    for (path, key), op in adapter_of(model, "a").ops.items():
        for role, p in roles_of(op):
            if p.grad is not None and p.grad.abs().max() > 0:
                continue
            own = [q for name, q in model.get_submodule(path).named_parameters() if ".slim." not in f".{name}"]
            reads = not own or any(q.grad is not None and q.grad.abs().max() > 0 for q in own)
            assert not reads, f"no gradient reaches {path} ({key}, {role}), though the model uses it"
            unread.add(path)
    return f"the model itself does not read {_short(unread)}, so no gradient comes back from there" if unread else ""


def disabled(b: Bench) -> str:
    model = b.attached("a", "b")
    base, out = b.out(b.model.build()), b.out(model)
    differ(out, base, "a random adapter")
    with st.disabled(model):
        b.same(b.out(model), base, "disabled is not the base")
    b.same(b.out(model), out, "not as before after `disabled`")
    st.use(model, None)
    b.same(b.out(model), base, "use(None) is not the base")
    st.detach(model, "a")
    st.detach(model, "b")
    b.same(b.out(model), base, "not the base after detach")
    return ""


def rows(b: Bench) -> str:
    """A mixed batch equals each row alone, None among them."""
    model = b.attached("a", "b")
    plan: list[Which] = ["a", None, "b", ["a", "b"], "a"]
    batch = b.model.inputs(len(plan))
    if _blind(b, model):
        with refused(PlanError, what="rows= where rows cannot be told apart", place=True), st.use(model, rows=plan):
            b.model.run(model, batch)
        return f"`rows=` is refused: {b.model.rows}"
    with torch.no_grad(), st.use(model, rows=plan):
        mixed = b.model.run(model, batch)
    for i, which in enumerate(plan):
        with torch.no_grad(), st.use(model, which):
            b.close(mixed[i : i + 1], b.model.run(model, b.model.one(batch, i)), f"row {i} ({which})")
    with st.use(model, None), torch.no_grad():
        differ(mixed[:1], b.model.run(model, b.model.one(batch, 0)), "the first row's adapter")
    return ""


def _blind(b: Bench, model: nn.Module) -> bool:
    """Tell whether an op sits on a module that runs once for the whole batch."""
    return any(matches(pattern, path, model.get_submodule(path), set()) for pattern in b.model.shared for path, _ in adapter_of(model, "a").ops)


def merge(b: Bench) -> str:
    model = b.attached("a")
    out, before = b.out(model), bits(model)
    if not all(affine(op) for op in adapter_of(model, "a").ops.values()):
        with refused(CapabilityError, what="merging a method without exact weights", place=True):
            st.merge(model, "a")
        assert bits(model) == before, "the refused merge changed the base"
        return ""
    st.merge(model)
    b.close(b.out(model), out, "merged output")
    assert bits(model) != before, "merging changed no weight"
    st.unmerge(model)
    assert bits(model) == before, "unmerge does not restore the bits"
    b.same(b.out(model), out, "the output is another one after unmerge")
    return ""


def files(b: Bench) -> str:
    model = b.attached("a")
    with tempfile.TemporaryDirectory() as folder:
        st.save(model, Path(folder, "one"), name="a")
        other = b.model.build()
        st.load(other, Path(folder, "one"), name="a")
        b.same(b.out(other), b.out(model), "output after loading")
    return ""


def checkpointing(b: Bench) -> str:
    """The model's own gradient checkpointing, both kinds, or torch's around a whole plain module."""
    found: list[Any] = []
    calls: list[int] = []
    on_head = all(part.targets == "head" for part in b.spec.parts())  # then no gradient enters the blocks, and nothing is recomputed
    for how in (None, True, False):
        model = b.attached("a").train()
        batch = b.model.inputs(4)
        call = _checkpointed(model, how)
        if call is None:
            return ""
        count = _Count()
        hooks = [m.register_forward_hook(count) for m in model.modules()]
        torch.manual_seed(3)
        with st.use(model, "a"):
            out = b.model.out(call(batch))
        loss_of(out).backward()
        for hook in hooks:
            hook.remove()
        found.append(gradients(model, "a"))
        calls.append(count.calls)
    for got, n, kind in zip(found[1:], calls[1:], ("reentrant", "not reentrant"), strict=True):
        assert n > calls[0] or on_head, f"nothing was recomputed ({kind})"
        for g, w in zip(got, found[0], strict=True):
            if w is None or not w.abs().max() > 0:
                assert g is None or not g.abs().max() > 0, f"checkpointing, {kind}: a gradient where there is none without"
            else:
                assert g is not None, f"checkpointing, {kind}: a gradient is missing"
                b.close(g, w, f"gradients with checkpointing, {kind}")
    return ""


class _Count:
    """A forward hook that counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


def _checkpointed(model: Any, reentrant: bool | None) -> Callable[[Batch], Any] | None:
    """Return a call of the model with checkpointing of one kind (None: without), or None where the model offers none."""

    def plain(batch: Batch) -> Any:
        return model(**batch)

    if hasattr(model, "gradient_checkpointing_enable"):
        if not model.supports_gradient_checkpointing:
            return None
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return plain
    if hasattr(model, "enable_gradient_checkpointing"):
        if not model._supports_gradient_checkpointing:
            return None
        if reentrant is not None:
            model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
        return plain
    if reentrant is None:
        return plain
    keep = st.keep_plan(model, checkpoint)
    spark = torch.zeros((), requires_grad=True)  # the reentrant kind needs one input that asks for gradients
    return lambda batch: keep(lambda _, *a: model(*a), spark, *batch.values(), use_reentrant=reentrant)


def generate(b: Bench) -> str:
    """`generate` gives the forward's own logits at each step, and a mixed batch gives those of each row alone."""
    if not b.model.prompt:
        return ""
    model = b.attached("a", "b")
    plan: list[Which] = ["a", None, "b"]
    prompt = {k: t for k, t in b.model.inputs(len(plan)).items() if k in b.model.prompt}
    rtol = max(b.model.rtol, 1e-6)  # generate hands out its logits in float32
    alone = []
    for i, which in enumerate(plan):
        with st.use(model, which):
            one = b.model.one(prompt, i)
            ids, logits = _generate(model, one)
            alone.append((ids, logits))
            close(logits, _stepwise(model, one, ids), f"generate under {which}", rtol)
    with st.disabled(model):
        differ(alone[0][1], _generate(model, b.model.one(prompt, 0))[1], "generate with an adapter")
    with st.use(model, rows=plan):
        _, mixed = _generate(model, prompt)
    for i, (_, logits) in enumerate(alone):
        close(mixed[:, i : i + 1], logits, f"generate with rows=, row {i}", rtol)
    return ""


def _generate(model: Any, prompt: Batch) -> tuple[Tensor, Tensor]:
    """Return (the two new tokens [n, 2], their logits [2, n, vocabulary])."""
    with torch.no_grad():
        out = model.generate(
            **prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
        )  # fmt: skip
    return out.sequences[:, -2:], torch.stack(out.logits)


def _stepwise(model: Any, prompt: Batch, new: Tensor) -> Tensor:
    """Return the logits of the two steps from plain forwards without any cache."""
    found = []
    with torch.no_grad():
        for step in range(2):
            batch = dict(prompt)
            if model.config.is_encoder_decoder:
                begin = torch.full_like(new[:, :1], model.config.decoder_start_token_id)
                batch["decoder_input_ids"] = torch.cat([begin, new[:, :step]], 1)
            else:
                mask = batch["attention_mask"]
                batch["input_ids"] = torch.cat([batch["input_ids"], new[:, :step]], 1)
                batch["attention_mask"] = mask = torch.cat([mask, torch.ones_like(new[:, :step])], 1)
                if "position_ids" in model.forward.__code__.co_varnames or model.config.model_type == "gpt2":
                    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
            found.append(model(**batch).logits[:, -1])
    return torch.stack(found)


def _short(paths: set[str]) -> str:
    """Return the paths, with the block itself in place of what lies inside a block."""
    found = {f"{at[0]}.{at[1]}" if (at := layer_of(path)) is not None else path for path in paths}
    return ", ".join(f"`{path}`" for path in sorted(found))
