"""A small float64 net with a module of every usual kind, and what the tests of algebra ask of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.algebra.merge import merged_sites, merged_values
from slimtune.core.plan import Plan


class Net(nn.Module):
    """Linear maps with and without bias, a norm, an embedding, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.o = nn.Linear(12, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        h = h + self.conv(h.mT).mT
        out: Tensor = self.o(self.norm(self.k(torch.tanh(self.q(h)))))
        return out


IDS = torch.arange(20).reshape(4, 5) % 11


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def fill(model: nn.Module, name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.slim_state.adapters[name].parameters():  # type: ignore[union-attr, operator, index]
            p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype), alpha=0.4)


def with_adapters(**specs: st.Spec) -> nn.Module:
    model = net()
    for i, (name, spec) in enumerate(specs.items()):
        st.attach(model, spec, name=name)
        fill(model, name, i)
    return model


def out(model: nn.Module, which: object) -> Tensor:
    with torch.no_grad(), st.use(model, which):  # type: ignore[arg-type]
        return model(IDS)  # type: ignore[no-any-return]


def delta(model: nn.Module, name: str, path: str) -> Tensor:
    """Return the dense change of one weight, by what merging would write."""
    links = Plan.of(name).segments[0][1]
    for module, param, chain in merged_sites(model, links):
        if module is model.get_submodule(path):
            weight = merged_values(module, param, chain)[0]
            assert weight is not None
            return weight - module.slim.kind.read(module, param).detach()  # type: ignore[union-attr, operator]
    raise AssertionError(path)


LINEAR = ("q", "k", "o")
EVERYTHING = ("q", "k", "o", "conv", "emb")
