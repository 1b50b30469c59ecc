"""The bottleneck family against its formulas in float64, its options, and its shared tensors."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import CapabilityError, SpecError
from slimtune.files.container import read_tensors
from slimtune.testing import zoo
from slimtune.testing.cases import rescale
from slimtune.testing.subject import adapter_of, fill


class FeedForward(nn.Module):
    def __init__(self, d: int = 8, f: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))  # type: ignore[no-any-return]


def attached(spec: st.Spec, std: float = 0.4) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward()).double()
    st.attach(model, spec)
    fill(model, "default", std)
    op = next(iter(adapter_of(model, "default").ops.values()))
    return model, op, torch.randn(3, 5, 8, dtype=torch.float64)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


def formula(op: Any, v: Tensor, scale: float, gelu: bool = False) -> Tensor:
    if op.norm_in_w is not None:
        v = layer_norm(v, op.norm_in_w, op.norm_in_b)
    h = v @ op.down_w.T + op.down_b
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2))) if gelu else h.clamp_min(0)
    d = h @ op.up_w.T + op.up_b
    if op.norm_out_w is not None:
        d = layer_norm(d, op.norm_out_w, op.norm_out_b)
    return (op.s.item() if op.s is not None else scale) * d


@pytest.mark.parametrize("norm", ["none", "before", "after", "both"])
@pytest.mark.parametrize("train_scale", [False, True])
def test_sequential(norm: str, train_scale: bool) -> None:
    model, op, x = attached(st.Bottleneck(reduction=2, norm=norm, scale=1.5, train_scale=train_scale, nonlinearity="gelu"))
    with st.disabled(model):
        y = model(x)
    torch.testing.assert_close(model(x), y + formula(op, y, 1.5, gelu=True))
    assert {n for n, _ in op.named_parameters()} == {n for n, _ in op.tensors()}


@pytest.mark.parametrize("norm", ["none", "both"])
def test_parallel(norm: str) -> None:
    model, op, x = attached(st.Parallel(reduction=2, norm=norm))
    assert (op.down_w.shape, op.entrance) == ((4, 8), "0.fc1")
    with st.disabled(model):
        y = model(x)
    torch.testing.assert_close(model(x), y + formula(op, x, 4.0))


@pytest.mark.parametrize("rank", [1, 2])
def test_compacter_is_a_sum_of_kronecker_products(rank: int) -> None:
    model, op, x = attached(st.Compacter(reduction=2, n=2, rank=rank))
    with st.disabled(model):
        y = model(x)
    down = sum(torch.kron(op.rule[i], op.down_s[i] @ op.down_t[i]) for i in range(2))
    up = sum(torch.kron(op.rule[i], op.up_s[i] @ op.up_t[i]) for i in range(2))
    assert isinstance(down, Tensor)
    assert down.shape == (8, 4)
    h = y @ down + op.down_b
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(model(x), y + h @ up + op.up_b)


def test_compacter_starts_with_the_variance_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward(256, 256))
    found = []
    for i in range(8):
        st.attach(model, st.Compacter(reduction=2, n=4), name=f"a{i}")
        op: Any = next(iter(adapter_of(model, f"a{i}").ops.values()))
        W = sum(torch.kron(op.rule[i], op.down_s[i] @ op.down_t[i]) for i in range(4))
        assert isinstance(W, Tensor)
        found.append(float(W.detach().var()))
        assert not op.up_t.any()
    assert sum(found) / len(found) == pytest.approx(1 / (3 * 256), rel=0.6)


def test_the_shared_rule_is_one_tensor(tmp_path: Path) -> None:
    model = zoo.llama().double()
    report = st.attach(model, st.Compacter(), name="a")
    ops: Any = list(adapter_of(model, "a").ops.values())
    assert len(ops) == 6
    assert len({id(op.rule) for op in ops}) == 1
    each = (32 + 4) * 2 + 4 + 32
    assert report.trainable == 6 * each + 64
    assert report.bytes == 8 * report.trainable
    assert sum(p.numel() for g in st.param_groups(model, lr=1.0) for p in g["params"]) == report.trainable
    fill(model, "a")
    rule = ops[0].rule.detach().clone()

    twin = copy.deepcopy(model)
    assert len({id(op.rule) for op in adapter_of(twin, "a").ops.values()}) == 1
    assert adapter_of(twin, "a").ops.keys() == adapter_of(model, "a").ops.keys()

    st.save(model, tmp_path / "a", name="a")
    held = read_tensors(tmp_path / "a" / "adapter_model.safetensors").entries
    assert sum("rule" in name for name in held) == 1
    assert sum(math.prod(e.shape) for e in held.values()) == report.trainable
    other = zoo.llama().double()
    again = st.load(other, tmp_path / "a", trainable=True)
    loaded: Any = list(adapter_of(other, "a").ops.values())
    assert len({id(op.rule) for op in loaded}) == 1
    assert torch.equal(loaded[3].rule, rule)
    assert again.trainable == report.trainable
    other.float()
    assert len({id(op.rule) for op in loaded}) == 1


def test_two_compacters_do_not_share() -> None:
    model = zoo.llama()
    for name in "ab":
        st.attach(model, st.Compacter(), name=name)
    assert len({id(op.rule) for name in "ab" for op in adapter_of(model, name).ops.values()}) == 2


def test_places() -> None:
    def ends(spec: st.Spec) -> list[str]:
        model = zoo.bert()
        return [row.path.removeprefix("bert.encoder.layer.") for row in st.attach(model, replace(spec, train_modules=())).rows]

    assert ends(st.Bottleneck()) == ["0.output.dense", "1.output.dense"]
    assert ends(st.Houlsby()) == ["0.attention.output.dense", "0.output.dense", "1.attention.output.dense", "1.output.dense"]
    assert ends(st.Houlsby(layers="last:1", exclude="attention")) == ["1.output.dense"]
    assert ends(st.Parallel(targets=("o", "down"), layers="0")) == ["0.attention.output.dense", "0.output.dense"]
    assert ends(st.Bottleneck(targets="pooler")) == ["bert.pooler"]


def test_dropout_only_while_training() -> None:
    model, _, x = attached(st.Bottleneck(reduction=1, dropout=0.5))
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_norm_after_learns_from_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FeedForward()).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    base = model(x).detach()
    st.attach(model, st.Bottleneck(norm="after"))
    torch.testing.assert_close(model(x), base)
    (model(x) - 1).square().mean().backward()
    grads = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
    assert max(grads) > 0
    assert max(grads) < 10


LEARN = {
    "bottleneck": st.Bottleneck(reduction=2), "houlsby": st.Houlsby(reduction=2), "parallel": st.Parallel(reduction=2, targets=("o", "down")),
    "compacter": st.Compacter(reduction=2, n=2), "normed": st.Houlsby(reduction=2, norm="both", train_scale=True), "gated": st.Gated(of=st.Houlsby()),
    "union": st.Union(of=(st.LoRA(r=2), st.Parallel())),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARN)
def test_it_learns(name: str) -> None:
    """A tiny BERT learns to tell sequences by whether a token is in them; the frozen head alone knows nothing of it."""
    torch.manual_seed(0)
    model: Any = rescale(zoo.bert())
    ids = torch.randint(5, 99, (64, 6))
    labels = torch.arange(64) % 2
    ids[labels == 1, 2] = 3
    assert (model(input_ids=ids).logits.argmax(-1) == labels).double().mean() < 0.8
    st.attach(model, LEARN[name])
    optimiser = torch.optim.Adam(st.param_groups(model, lr=1e-2))
    for _ in range(80):
        out = model(input_ids=ids, labels=labels)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    right = (model(input_ids=ids).logits.argmax(-1) == labels).double().mean()
    assert right > 0.95, f"{name}: {right:.2f} right, loss {out.loss:.3f}"


def test_problems_come_all_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        st.Bottleneck(reduction=0, nonlinearity="sine", norm="twice", dropout=1.0).validate()
    for word in ("reduction", "sine", "twice", "dropout"):
        assert word in caught.value.what
    with pytest.raises(SpecError, match="n=3 does not divide the width 8"):
        st.attach(nn.Sequential(FeedForward()), st.Compacter(n=3))
    with pytest.raises(SpecError, match="n must be at least 1"):
        st.Compacter(n=0).validate()


def test_merging_is_refused() -> None:
    model, _, _ = attached(st.Parallel())
    with pytest.raises(CapabilityError, match="no affine map"):
        st.merge(model)
