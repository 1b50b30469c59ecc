"""The low-rank kernels and their dropout: against autograd, and over steps, layers and checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune as st
from slimtune.kernels.dropout import STRETCH, draw_seed, forget, kept, masked
from slimtune.kernels.gain import scale_outputs
from slimtune.kernels.lowrank import add_low_rank, linear_low_rank


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(fused: bool, p: float, bias: bool) -> None:
    torch.manual_seed(0)
    x, A, B = leaf(2, 3, 5), leaf(2, 5), leaf(4, 2)
    W, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        forget()
        if fused:
            return linear_low_rank(x, W, b, A, B, 0.7, p)
        return add_low_rank(F.linear(x, W, b), x, A, B, 0.7, p)

    assert torch.autograd.gradcheck(call, (x, A, B))
    torch.manual_seed(1)
    forget()
    xd = x
    if p:
        mask, scale = kept(x.shape, p, draw_seed(x, A), x.device, x.dtype)
        xd = masked(x * scale, mask)
    torch.testing.assert_close(call(x, A, B), F.linear(x, W, b) + 0.7 * (xd @ A.T) @ B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, A, B = leaf(2, 3, 16, dtype=dtype), leaf(4, 16, dtype=torch.float32), leaf(8, 4, dtype=torch.float32)
    W = torch.randn(8, 16, dtype=dtype)
    want = F.linear(x, W) + 0.5 * F.linear(F.linear(x, A.to(dtype)), B.to(dtype))
    g = torch.randn_like(want)
    expected = torch.autograd.grad(want, (x, A, B), g)
    for got in (linear_low_rank(x, W, None, A, B, 0.5), add_low_rank(F.linear(x, W), x, A, B, 0.5)):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
        torch.testing.assert_close(got, want, **tolerance)
        for p, q in zip(torch.autograd.grad(got, (x, A, B), g), expected, strict=True):
            assert p.dtype == q.dtype
            torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(p: float) -> None:
    x, A, B, W = leaf(3, 5), leaf(2, 5), leaf(4, 2), torch.randn(4, 5, dtype=torch.float64)

    def seeded(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        forget()
        return linear_low_rank(x.tanh(), W, None, A, B, 0.5, p).tanh()

    assert torch.autograd.gradgradcheck(seeded, (x, A, B))
    gain = leaf(4)
    assert torch.autograd.gradgradcheck(lambda x, gain: scale_outputs(F.linear(x, W), gain, None).tanh(), (x, gain))


def test_a_second_derivative_that_needs_what_was_not_kept_is_refused() -> None:
    x, A, B = leaf(3, 5), leaf(2, 5).detach(), leaf(4, 2)
    y = linear_low_rank(x, torch.randn(4, 5, dtype=torch.float64), None, A, B, 1.0)
    with pytest.raises(st.CapabilityError, match="was not kept"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def stays(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    bits, scale = kept(torch.Size(shape), p, seed, torch.device("cpu"), torch.bfloat16)
    assert set(bits.unique().tolist()) <= {0, -1}
    assert abs(1 / scale - (1 - p)) <= 2**-15
    return (bits != 0).float()


def test_the_mask_is_fair_and_its_mean_exact() -> None:
    for p in (0.05, 0.5, 0.9):
        mask = stays((400, 501), p, 3)
        assert abs(1 - mask.mean().item() - p) < 0.005
        assert torch.equal(mask, stays((400, 501), p, 3))
        columns = 1 - mask.mean(0)
        assert columns.min() > p - 0.15
        assert columns.max() < p + 0.15


def test_probabilities_near_their_ends_leave_and_drop_something() -> None:
    for p in (1e-9, 1 - 1e-9):
        bits, scale = kept(torch.Size([8]), p, 3, torch.device("cpu"), torch.float32)
        assert bits.shape == (8,)
        assert 1 < scale <= 2**15


def test_dropout_as_an_operator() -> None:
    """Compiled code drops with the seed's mask too: fair, its scale exact, and the gradient drops what forward dropped."""
    from slimtune.kernels.dropout import _opaque, dropout

    seed = torch.tensor(7)
    x = torch.randn(8, 6, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(_opaque, (x, 0.25, seed))
    assert torch.autograd.gradcheck(lambda t: _opaque(t, 0.25, seed), x)
    fast = torch.compile(lambda t: dropout(t, 0.25), fullgraph=True, backend="aot_eager")
    x = torch.ones(400, 100).requires_grad_()
    y, again = fast(x), fast(x)
    assert not torch.equal(y, again)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, y.detach())


def test_masks_of_different_seeds_are_independent() -> None:
    """They are stretches of one pool: elements that meet there, and elements at the same place, agree no more often than chance."""
    p = 0.3
    masks = torch.stack([stays((37,), p, seed) for seed in range(2000)])
    each = masks.mean(0)
    assert (each - (1 - p)).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5, "every single element is fair over the seeds"
    together = (masks.T @ masks / 2000 - each[:, None] * each).fill_diagonal_(0)
    assert together.abs().max() < 5.5 * p * (1 - p) / 2000**0.5, "and any two of them independent"
    long = 4 * STRETCH + 12_345  # two stretches
    a, b = stays((long,), p, 5), stays((long,), p, 6)
    for shift in (0, 1, 4, 4 * STRETCH - 4):
        n = long - shift
        for x, y in ((a[:n], b[shift:]), (b[:n], a[shift:]), *(((a[:n], a[shift:]),) if shift else ())):
            agree = float((x == y).float().mean())
            assert agree == pytest.approx(p * p + (1 - p) ** 2, abs=5 * (0.25 / n) ** 0.5), shift


def test_who_shares_a_mask() -> None:
    forget()
    x, other, q, k = torch.randn(3), torch.randn(3), torch.randn(1), torch.randn(1)
    first = draw_seed(x, q)
    assert draw_seed(x, k) == first, "projections of one input share its mask"
    again = draw_seed(x, q)
    assert again != first, "the same layer on the same input in the next step"
    assert draw_seed(x, k) == again
    assert draw_seed(other, k) != again
    x.add_(1)
    assert draw_seed(x, k) not in {first, again}, "a changed input is another input"


def test_every_step_on_the_same_batch_has_its_own_mask() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    st.attach(net, st.LoRA(r=4, dropout=0.5))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    x = torch.randn(8, 16)
    net.train()
    assert not torch.equal(net(x), net(x))
    torch.manual_seed(5)
    a = net(x)
    torch.manual_seed(5)
    assert torch.equal(a, net(x)), "and the seed decides it"


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_checkpointing(reentrant: bool) -> None:
    """The second run of a region draws the masks of the first, also where the region's input is read outside it."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"outside": nn.Linear(8, 8), "q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}).double()
    st.attach(net, st.LoRA(r=2, dropout=0.5))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    params = [p for p in net.parameters() if p.requires_grad]
    x = torch.randn(4, 8, dtype=torch.float64).requires_grad_()
    keep = st.keep_plan(net, checkpoint)

    def block(x: Tensor) -> Tensor:
        return torch.tanh(net["q"](x)) * net["k"](x)

    def run(wrapped: bool) -> list[Tensor]:
        torch.manual_seed(7)
        forget()
        y = net["outside"](x)
        if wrapped:
            z = keep(block, x, use_reentrant=reentrant)
        else:
            forget()
            z = block(x)
        net.zero_grad()
        x.grad = None
        (y + z).square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in params)]  # type: ignore[union-attr]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("biased", [False, True])
def test_gain_in_place_has_the_right_gradients(biased: bool) -> None:
    torch.manual_seed(0)
    x, W, g = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 7), (5, 7), (5,)))
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    assert torch.autograd.gradcheck(lambda x, W, g: scale_outputs(x @ W.T, g, bias), (x, W, g))


def test_gain_of_zero_gives_no_nan_and_keeps_its_result_from_being_written_over() -> None:
    g = torch.tensor([0.0, 2.0], requires_grad=True)
    x = torch.ones(3, 2, requires_grad=True)
    y = scale_outputs(x * 1.0, g, None)
    z = add_low_rank(y, torch.ones(3, 4), torch.ones(1, 4), torch.ones(2, 1), 1.0)
    z.sum().backward()
    assert z.data_ptr() != y.data_ptr()
    assert torch.equal(g.grad, torch.tensor([0.0, 3.0]))


class _Residual(nn.Module):
    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh())
        if self.writes:
            y += x
            return y
        return y + x


def test_dora_in_a_model_that_adds_into_its_result() -> None:
    """As Falcon does with its residuals: the first step shows it, and every step has the gradients of a model that does not."""
    torch.manual_seed(0)
    nets = [_Residual(writes).double() for writes in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    for net in nets:
        torch.manual_seed(1)
        st.attach(net, st.DoRA(of=st.LoRA(r=2, targets=("first", "second"))))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 if p.requires_grad else 0.0)
    for _ in range(3):
        grads = []
        for net in nets:
            net.zero_grad()
            net(x).square().sum().backward()
            grads.append([p.grad for p in net.parameters() if p.requires_grad])
        torch.testing.assert_close(grads[0], grads[1])


def test_dora_before_a_module_that_writes_over_its_input() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=writes), nn.Linear(8, 4)).double() for writes in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    grads = []
    for net in nets:
        torch.manual_seed(1)
        st.attach(net, st.DoRA(of=st.LoRA(r=2, init="gaussian")))
        net(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert grads[0]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))
