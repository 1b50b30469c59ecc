"""P-tuning: virtual tokens that a small network makes out of trained vectors; only what it makes is kept in files.

    MLP     e = W3 relu(W2 relu(W1 z + b1) + b2) + b3            z [p, d], hidden width h
    LSTM    e = W2 relu(W1 lstm(z, both ways) + b1) + b2

Paper: arXiv 2103.10385. Cost while training: p d + 2 h d + h^2 parameters (MLP), after loading p d; p more tokens in every forward.
Cannot: merge; go on training the network after a file was loaded (the virtual tokens themselves train on).
Choose it when prompt tuning is too unstable: a small network makes the prompt and is thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimtune.core.registry import register
from slimtune.core.site import Site
from slimtune.ports.prompts import PromptOp, PromptSpec, normal
from slimtune.ports.stream import width_of

ENCODERS = ("mlp", "lstm")


class PTuningOp(PromptOp):
    """z [p, d] and the network; without the network, z are the virtual tokens."""

    roles = {"prompt": "core"}

    def __init__(self, site: Site, z: Tensor, network: nn.Module | None, keep: bool) -> None:
        super().__init__(site, z.shape[0], keep)
        self.z = nn.Parameter(z)
        self.network = network

    @property
    def prompt(self) -> Tensor:
        """The virtual tokens [p, d]."""
        made: Tensor = self.z if self.network is None else self.network(self.z)
        return made

    def rows(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return self.prompt

    # ---- files --------------------------------------------------------------------------------------------------
    def export(self, module: nn.Module) -> dict[str, Tensor]:
        """Return what the network makes, without its dropout."""
        was = self.training
        self.eval()
        with torch.no_grad():
            made = self.prompt
        self.train(was)
        return {"prompt": made}

    def expects(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt": tuple(self.z.shape)}

    def reset_from(self, tensors: dict[str, Tensor], module: nn.Module) -> None:
        """Take over the virtual tokens of a file; the network that made them is gone."""
        self.network = None
        with torch.no_grad():
            self.z.copy_(tensors["prompt"])


class LSTMNetwork(nn.Module):
    """A bidirectional LSTM along the virtual tokens, then two linear maps."""

    def __init__(self, d: int, h: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.h, self.layers, self.dropout = h, layers, dropout
        # Its parameters without the module around them: torch.compile refuses that, and takes the function it calls.
        self.lstm = nn.ParameterList(nn.LSTM(d, h, num_layers=layers, bidirectional=True).parameters())
        self.head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))

    def forward(self, z: Tensor) -> Tensor:
        zero = z.new_zeros(2 * self.layers, 1, self.h)  # two directions in each layer
        both = torch.lstm(z[None], (zero, zero), list(self.lstm), True, self.layers, self.dropout, self.training, True, True)[0]
        out: Tensor = self.head(both[0])  # [p, 2 h] -> [p, d]
        return out


def mlp(d: int, h: int) -> nn.Module:
    """Return the three linear maps of the MLP form."""
    return nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))


@register("p_tuning")
@dataclass(frozen=True, kw_only=True)
class PTuning(PromptSpec):
    """Virtual tokens made by a small network (arXiv 2103.10385).

    Args:
        encoder: the network: "mlp" or "lstm".
        hidden: h, its width; default: d.
        encoder_layers: of the LSTM.
        dropout: between the LSTM's layers, while training.
        targets, tokens, keep, width, seed: see `slimtune.ports.prompts.PromptSpec`.

    Example:
        >>> import slimtune as st
        >>> st.PTuning(tokens=8, encoder="lstm", hidden=64).hidden
        64
    """

    encoder: str = "mlp"
    hidden: int | None = None
    encoder_layers: int = 2
    dropout: float = 0.0

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.encoder not in ENCODERS:
            wrong.append(f"encoder must be one of {', '.join(ENCODERS)}, not {self.encoder!r}")
        if self.hidden is not None and self.hidden < 1:
            wrong.append(f"hidden must be at least 1, not {self.hidden}")
        if self.encoder_layers < 1:
            wrong.append(f"encoder_layers must be at least 1, not {self.encoder_layers}")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be in [0, 1), not {self.dropout}")
        if self.dropout and (self.encoder == "mlp" or self.encoder_layers == 1):
            wrong.append("dropout= acts between the layers of an LSTM: it needs encoder=\"lstm\" and encoder_layers of at least 2")
        return wrong

    def prompt(self, site: Site, keep: bool) -> PTuningOp:
        d = width_of(site, self.width)
        h = self.hidden or d
        empty = torch.empty(self.tokens, d, device=site.device, dtype=site.dtype)
        if site.loading:
            return PTuningOp(site, empty, None, keep)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = mlp(d, h) if self.encoder == "mlp" else LSTMNetwork(d, h, self.encoder_layers, self.dropout)
        start = empty if site.blank else normal(site, self.tokens, d, self.seed)
        return PTuningOp(site, start, network.to(device=site.device, dtype=site.dtype), keep)
