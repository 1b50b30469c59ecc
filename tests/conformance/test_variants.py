"""The options of LoRA that change its arithmetic pass the suite like LoRA itself; the suite finds ops that are wrong."""

import dataclasses
from typing import Any

import pytest
import torch
from compiled import run_compiled
from torch import Tensor, nn

import slimtune as st
from slimtune.core.op import Op
from slimtune.core.site import Site
from slimtune.methods.lora import LoRAOp
from slimtune.testing import CASES, PROPERTIES, Check, check_method, checks
from slimtune.testing.cases import case

VARIANTS = {
    "rank-stabilised": st.LoRA(r=4, alpha=3, rank_stabilised=True),
    "up bias": st.LoRA(r=4, up_bias=True),
    "PiSSA": st.LoRA(r=4, init="pissa"),
    "OLoRA": st.LoRA(r=4, init="olora"),
    "A frozen": st.LoRA(r=4, freeze="A"),
    "means of 16": st.QALoRA(r=4, pool="mean", group=16),
    "per-module ranks": st.LoRA(r=4, rank_pattern={"body": 2}, alpha_pattern={"body": 5.0}),
    "adding biases": st.BitFit(missing="add"),
    "normed": st.Parallel(reduction=8, norm="both", train_scale=True),
    "union that changes the input and reads the output": st.Union(of=(st.IA3(feedforward=("body",)), st.Bottleneck(reduction=8))),
    "smooth": st.Bottleneck(reduction=8, nonlinearity="gelu", scale=0.5),
}
PLACES = ("linear", "HF Conv1D", "conv2d", "embedding", "MultiheadAttention separate", "experts", "nf4")
ALL = [
    Check(label, c.subject, c.name, c.run)
    for label, spec in VARIANTS.items()
    for c in checks(spec, cases=[case(name) for name in PLACES])
]


@pytest.mark.parametrize("check", ALL, ids=str)
def test_variant(check: Check) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("where", [c.name for c in CASES if c.compiles])
def test_lora_compiles_everywhere(where: str) -> None:
    run_compiled(checks("lora", cases=[case(where)], compile_all=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", list(st.methods()))
def test_every_plan_compiles(method: str) -> None:
    run_compiled(checks(method, cases=[case("Llama")], compile_all=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_experts_compile_in_the_forms_that_can(how: str) -> None:
    """The plain loop over experts cannot be one graph, with or without an adapter; transformers' other two forms can."""
    plain = case("experts")

    def make(dtype: torch.dtype) -> nn.Module:
        model = plain.make(dtype)
        model.body.config._experts_implementation = how
        return model

    fit = dataclasses.replace(plain, make=make, compiles=True, name=how, dtype=torch.float32, rtol=1e-5)
    run_compiled(checks("lora", cases=[fit], compile_all=True))


# ---- wrong methods must fail ------------------------------------------------------------------------------------------
class ForgetsScale(LoRAOp):
    def delta(self) -> Tensor:
        return super().delta() / self.scale


class Slow(LoRAOp):
    add = Op.add  # through run, not through a fused form

    def low_rank(self) -> None:
        return None


class LooksAtTheBatch(Slow):
    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return super().run(x, y, host) * (1 + x.mean())


class Starts(LoRAOp):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        nn.init.ones_(self.B)


class CutsTheGradient(Slow):
    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return super().run(x.detach(), y, host)


class Hides(Slow):
    """Trains a tensor that it does not declare, so that no file has it."""

    def __init__(self, site: Site, *args: Any) -> None:
        super().__init__(site, *args)
        self.shift = nn.Parameter(torch.zeros(site.b, dtype=site.dtype))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return super().run(x, y, host) + self.shift

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.shift if b is None else b + self.shift


WRONG = {
    ForgetsScale: "merge_=_forward",
    LooksAtTheBatch: "mixed_rows",
    Starts: "identity",
    CutsTheGradient: "gradcheck",
    Hides: "saved_and_loaded",
}


@pytest.mark.parametrize("op", WRONG, ids=lambda op: op.__name__)
def test_a_wrong_op_is_caught(op: type[LoRAOp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st.LoRA, "build", lambda self, site: _built(op, self, site))
    with pytest.raises(AssertionError, match="checks failed") as caught:
        check_method("lora", cases=["linear"])
    assert WRONG[op] in str(caught.value)


def _built(op: type[LoRAOp], spec: st.LoRA, site: object) -> LoRAOp:
    made = op(site, spec.rank(site), spec.scale(site))  # type: ignore[arg-type]
    with torch.no_grad():
        nn.init.normal_(made.A, std=0.3)
        if op is not Starts:
            made.B.zero_()
    return made


def test_a_refusal_without_a_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimtune.core import attach as module

    def vague(*args: object, **kwargs: object) -> None:
        raise st.SlimtuneError("no")

    monkeypatch.setattr(module, "build", vague)
    with pytest.raises(AssertionError, match=r"names no place|has no hint"):
        check_method("lora", cases=["block"])


def test_check_method_counts() -> None:
    assert check_method("bitfit", cases=["linear"]) == len(PROPERTIES)
