"""What the parity tests share: tiny models, and the two ways a file can go between the reference library and slimtune."""

from __future__ import annotations

import inspect
import json
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import slimtune as st

warnings.filterwarnings("ignore")


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """What the reference reads: its 0.21 refuses a prefix on a classifier whose body does not name `past_key_values`; since 5.24 transformers
    takes that argument under the name of `cache`, and still under the old one."""
    own = inspect.signature(function)
    if "cache" not in own.parameters:
        return own
    old = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*named, old])


peft.peft_model.inspect = types.SimpleNamespace(**{**vars(inspect), "signature": signature})


class Zoo(nn.Module):
    """One module of every kind, and names that patterns can trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "fc_q": nn.Linear(8, 8, bias=False)}) for _ in range(3)])
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)  # [n, 6, 8]
        c = h.transpose(1, 2)
        h = h + (self.conv1(c) + self.grouped(c)).transpose(1, 2)
        h = h + self.conv2(h[:, None]).flatten(1)[:, :8][:, None]
        h = h + self.conv3(h.reshape(h.shape[0], 1, 6, 2, 4)).flatten(1)[:, :8][:, None]
        for layer in self.layers:
            h = h + layer["q"](torch.tanh(layer["fc_q"](h)))
        h = h + self.mha(h, h, h)[0]
        return self.score(self.norm(h))


def zoo() -> nn.Module:
    torch.manual_seed(0)
    return Zoo().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=13, n_positions=16)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=3, intermediate_size=24)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=13, max_position_embeddings=16, num_labels=3,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=13, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_hidden_layers=2, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


TINY = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 13, "max_position_embeddings": 16}


def unet() -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        attention_head_dim=8,
    )  # fmt: skip
    return model.eval()


def output(model: nn.Module) -> Tensor:
    names = {type(m).__name__ for m in model.modules()}
    ids = torch.arange(12).reshape(2, 6) % 13
    with torch.no_grad():
        if "UNet2DConditionModel" in names:
            x = torch.sin(torch.arange(512.0)).reshape(2, 4, 8, 8)
            return model(x, torch.tensor([3, 7]), encoder_hidden_states=torch.cos(torch.arange(96.0)).reshape(2, 3, 16)).sample
        out = model(ids, **({"decoder_input_ids": ids} if "T5ForConditionalGeneration" in names else {}))
    return out if isinstance(out, Tensor) else out.logits


def shake(parameters, std: float = 0.2) -> None:
    torch.manual_seed(7)
    for p in parameters:
        if p.requires_grad:
            torch.nn.init.normal_(p, std=std)


def theirs_and_back(make: Any, config: peft.PeftConfig, folder: Path, kind: str = "") -> nn.Module:
    """The reference's own file is loaded here, compared, saved again by us, and loaded there; returns our model.

    Args:
        kind: `peft_type` of our file; default: the config's own.
    """
    live = peft.get_peft_model(make(), config)
    shake(live.parameters())
    want = output(live.eval())
    live.save_pretrained(str(folder / "theirs"))
    assert (output(make()) - want).abs().max() > 1e-4

    mine = make()
    report = st.load(mine, folder / "theirs")
    assert (output(mine) - want).abs().max() < 1e-5, report
    st.save(mine, folder / "ours")
    assert config_in(folder / "ours")["peft_type"] == (kind or str(config.peft_type.value))

    back = peft.PeftModel.from_pretrained(make(), str(folder / "ours")).eval()
    assert (output(back) - want).abs().max() < 1e-5
    again = make()
    st.load(again, folder / "ours")
    assert (output(again) - want).abs().max() < 1e-5
    st.save(again, folder / "again")
    assert bytes_in(folder / "ours") == bytes_in(folder / "again")
    return mine


def ours_and_back(make: Any, spec: st.Spec, folder: Path, peft_type: str) -> nn.Module:
    """What we save is loaded by the reference, saved by it, and loaded here; returns the reference's model."""
    live = make()
    st.attach(live, spec, name="mine")
    shake(live.parameters())
    want = output(live)
    st.save(live, folder / "ours")
    assert config_in(folder / "ours")["peft_type"] == peft_type
    theirs = peft.PeftModel.from_pretrained(make(), str(folder / "ours")).eval()
    assert (output(theirs) - want).abs().max() < 1e-5
    theirs.save_pretrained(str(folder / "theirs"))
    assert _sorted(config_in(folder / "theirs")) == _sorted(config_in(folder / "ours"))
    mine = make()
    st.load(mine, folder / "theirs")
    assert (output(mine) - want).abs().max() < 1e-5
    return theirs


def _sorted(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with its lists in one order: the reference keeps some as sets, and adds the names that a task's head may have."""
    lists = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items()}
    return lists | ({"modules_to_save": "heads"} if config["task_type"] in {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"} else {})


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
