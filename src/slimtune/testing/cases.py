"""Cases: one tiny model for every kind of site, with inputs; the conformance properties run on each of them.

A case is data: how to build the model in a dtype, how to make a batch of n rows, and which modules to adapt. Models are made of
random weights under a fixed seed, so that two builds are equal to the bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One model to try a method on.

    Args:
        name: unique; also the column of the support matrix.
        make: (dtype) -> model; called under a fixed seed.
        batch: (n rows, dtype) -> the tensors of a call.
        targets: modules to adapt; None = whatever the method takes by default.
        in_dims: for each input, the dimension its rows lie along.
        out_dim: the same for the output.
        dtype: the dtype in which exact properties are checked.
        rtol: how far two ways of computing the same may differ there, relative to the largest entry.
        quantised: the base's weights are stored in 4 or 8 bits.
        rows: whether rows of a batch can be told apart inside the adapted modules; if not, `rows=` must be refused.
        step: of finite differences; larger where the base computes in float32 whatever its dtype.
        compiles: whether the bare model itself can be compiled as one graph.
        note: a remark for the docs.
    """

    name: str
    make: Callable[[torch.dtype], nn.Module]
    batch: Callable[[int, torch.dtype], Inputs]
    targets: tuple[str, ...] | None = ("body",)
    in_dims: tuple[int, ...] = (0,)
    out_dim: int = 0
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-10
    quantised: bool = False
    rows: bool = True
    step: float = 1e-6
    compiles: bool = True
    note: str = field(default="", compare=False)

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the model in eval mode, the same bits at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make(dtype or self.dtype).eval()

    def inputs(self, n: int = 4, dtype: torch.dtype | None = None) -> Inputs:
        """Return a batch of n rows, the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return self.batch(n, dtype or self.dtype)

    def one(self, inputs: Inputs, i: int) -> Inputs:
        """Return row i of a batch, as a batch of one."""
        return tuple(t.narrow(d, i, 1) for t, d in zip(inputs, self.in_dims, strict=True))

    def row(self, out: Tensor, i: int) -> Tensor:
        """Return row i of an output."""
        return out.narrow(self.out_dim, i, 1)

    def __str__(self) -> str:
        return self.name


class Box(nn.Module):
    """A model of one module, so that the module has a name; it returns the module's main tensor."""

    def __init__(self, body: nn.Module, pre: nn.Module | None = None) -> None:
        super().__init__()
        self.pre = pre if pre is not None else nn.Identity()
        self.body = body

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        out = self.body(self.pre(x), *rest)
        return out if isinstance(out, Tensor) else out[0]


class SelfAttention(Box):
    """nn.MultiheadAttention fed with one tensor, or with keys and values of other widths."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        keys, values = rest if rest else (x, x)
        out: Tensor = self.body(x, keys, values, need_weights=False)[0]
        return out


class Block(nn.Module):
    """A residual block that returns a tuple, as transformer blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.outer(torch.tanh(self.inner(x))), x.detach()


def rescale(model: nn.Module) -> nn.Module:
    """Give every tensor of a model entries of ordinary size, so that no property holds only because it is near zero."""
    for p in model.parameters():
        if p.is_floating_point():
            nn.init.normal_(p, mean=1.0 if p.dim() == 1 and p.mean() == 1 else 0.0, std=0.2)
    return model


def _box(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return rescale(Box(module)).to(dtype)


def _vectors(*shape: int) -> Callable[[int, torch.dtype], Inputs]:
    return lambda n, dtype: (torch.randn(n, *shape, dtype=torch.float64).to(dtype),)


def _linear(dtype: torch.dtype) -> nn.Module:
    return _box(nn.Linear(32, 64), dtype)


def _linear_no_bias(dtype: torch.dtype) -> nn.Module:
    return _box(nn.Linear(64, 32, bias=False), dtype)


def _hf_conv1d(dtype: torch.dtype) -> nn.Module:
    from transformers import pytorch_utils

    module: nn.Module = pytorch_utils.Conv1D(64, 32)  # type: ignore[no-untyped-call]
    return _box(module, dtype)


def _embedding(dtype: torch.dtype) -> nn.Module:
    table = nn.Embedding(50, 32, padding_idx=0)
    model = _box(table, dtype)
    with torch.no_grad():
        table.weight[0] = 0
    return model


def _ids(n: int, dtype: torch.dtype) -> Inputs:
    ids = torch.randint(1, 50, (n, 5))
    ids[:, 0] = 1  # a text begins with its special token
    return (ids,)


def _mha(dtype: torch.dtype, batch_first: bool = True, **widths: Any) -> nn.Module:
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **widths)
    return rescale(SelfAttention(attention)).to(dtype)


def _cross(n: int, dtype: torch.dtype) -> Inputs:
    shapes = ((n, 4, 32), (n, 6, 16), (n, 6, 48))
    return tuple(torch.randn(*s, dtype=torch.float64).to(dtype) for s in shapes)


def _encoder_layer(dtype: torch.dtype) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return rescale(Box(layer)).to(dtype)


def _experts(dtype: torch.dtype) -> nn.Module:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    config._experts_implementation = "eager"
    return _box(MixtralExperts(config), dtype)


def _transposed_experts(dtype: torch.dtype) -> nn.Module:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=32, intermediate_size=48, num_local_experts=4)
    config._experts_implementation = "eager"
    return _box(GptOssExperts(config), dtype)  # type: ignore[no-untyped-call]


def _routed(n: int, dtype: torch.dtype) -> Inputs:
    x = torch.randn(n, 32, dtype=torch.float64).to(dtype)
    picks = torch.stack([torch.randperm(4)[:2] for _ in range(n)])
    return x, picks, torch.rand(n, 2, dtype=torch.float64).to(dtype)


def _bnb(module: Any) -> nn.Module:
    model = Box(module)
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # on some CPUs the first call repacks the weight and rounds to bf16 from then on
    with torch.no_grad():
        nn.init.normal_(module.weight, std=0.2)
    return model.to("cpu")  # this is where bitsandbytes quantises


def _four_bit(quant_type: str) -> Callable[[torch.dtype], nn.Module]:
    def make(dtype: torch.dtype) -> nn.Module:
        bnb: Any = importlib.import_module("bitsandbytes")
        return _bnb(bnb.nn.Linear4bit(64, 32, quant_type=quant_type, compute_dtype=dtype).to(dtype))

    return make


def _eight_bit(dtype: torch.dtype) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    return _bnb(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False))


def _group_four_bit(dtype: torch.dtype) -> nn.Module:
    from slimtune.ports.group_quantised import GroupLinear

    layer = nn.Linear(64, 32)
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.2)
    return Box(GroupLinear(layer, group=32)).to(dtype)


def _llama(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return rescale(LlamaForCausalLM(config)).to(dtype)


def _bert(dtype: torch.dtype) -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(  # type: ignore[call-arg]
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, max_position_embeddings=128,
        num_labels=7, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return rescale(BertForTokenClassification(config)).to(dtype)


def _t5(dtype: torch.dtype) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(  # type: ignore[call-arg]
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=50, dropout_rate=0.0, use_cache=False, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return rescale(T5ForConditionalGeneration(config)).to(dtype)


def _pairs(n: int, dtype: torch.dtype) -> Inputs:
    """Return input ids, their mask, and decoder ids."""
    return torch.randint(2, 50, (n, 5)), torch.ones(n, 5, dtype=torch.long), torch.randint(2, 50, (n, 3))


def _conv(n_dim: int, dtype: torch.dtype, **options: Any) -> nn.Module:
    cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n_dim]
    return _box(cls(16, 32, 3, **options), dtype)


CASES: list[Case] = [
    Case("linear", _linear, _vectors(3, 32)),
    Case("linear, no bias", _linear_no_bias, _vectors(64)),
    Case("HF Conv1D", _hf_conv1d, _vectors(3, 32)),
    Case("conv1d", lambda d: _conv(1, d, padding=1), _vectors(16, 7)),
    Case("conv1d causal", lambda d: _conv(1, d, padding=2, dilation=2, bias=False), _vectors(16, 9)),
    Case("conv2d", lambda d: _conv(2, d), _vectors(16, 5, 4)),
    Case("conv2d grouped", lambda d: _conv(2, d, groups=4, padding="same"), _vectors(16, 4, 4)),
    Case("conv2d strided", lambda d: _conv(2, d, stride=2, padding=1, padding_mode="reflect"), _vectors(16, 5, 6)),
    Case("conv3d", lambda d: _conv(3, d, padding=1), _vectors(16, 3, 3, 3)),
    Case("embedding", _embedding, _ids),
    Case("MultiheadAttention packed", _mha, _vectors(4, 32)),
    Case(
        "MultiheadAttention sequence-first", lambda d: _mha(d, batch_first=False), lambda n, d: (_vectors(n, 32)(4, d)[0],),
        in_dims=(1,), out_dim=1,
    ),
    Case("MultiheadAttention separate", lambda d: _mha(d, kdim=16, vdim=48), _cross, in_dims=(0, 0, 0)),
    Case("TransformerEncoderLayer", _encoder_layer, _vectors(4, 32), targets=("all-linear",)),
    Case("experts", _experts, _routed, in_dims=(0, 0, 0), compiles=False),
    Case("experts, transposed", _transposed_experts, _routed, in_dims=(0, 0, 0), compiles=False),
    Case("LayerNorm", lambda d: _box(nn.LayerNorm(32), d), _vectors(3, 32)),
    Case("RMSNorm", lambda d: _box(nn.RMSNorm(32), d), _vectors(3, 32)),
    Case("block", lambda d: rescale(Box(Block(32))).to(d), _vectors(3, 32)),
    Case("nf4", _four_bit("nf4"), _vectors(3, 64), dtype=torch.float32, rtol=2e-5, quantised=True),
    Case("fp4", _four_bit("fp4"), _vectors(3, 64), dtype=torch.float32, rtol=2e-5, quantised=True),
    Case("group 4-bit", _group_four_bit, _vectors(3, 64), dtype=torch.float32, rtol=2e-5, quantised=True),
    Case("int8", _eight_bit, _vectors(3, 64), dtype=torch.float32, rtol=2e-5, quantised=True),
    # transformers rounds a float64 norm to float32 inside, so an adapted one can agree to that only
    Case("Llama", _llama, _ids, targets=None, step=1e-3, rtol=2e-6),
    Case("BERT", _bert, _ids, targets=None),
    Case("T5", _t5, _pairs, targets=None, in_dims=(0, 0, 0), step=1e-3, rtol=2e-6),
]  # fmt: skip


def case(name: str) -> Case:
    """Return the case of this name."""
    return next(c for c in CASES if c.name == name)
