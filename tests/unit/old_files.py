"""The bases that tests/data/written_by_0_1_0 was made on, and what was put onto them: weights follow from their names, not from a library's
initialization, so that they are the same under any version of torch and transformers.

The adapters and the run there were written by slimtune 0.1.0 (commit 5b3144a) with `python tests/unit/old_files.py FOLDER`; they stay as they are.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import slimtune as st

OLD = Path(__file__).parents[1] / "data" / "written_by_0_1_0"
EXPECTED = "expected.safetensors"
SPECS: dict[str, Any] = {
    "lora": st.LoRA(r=2, targets=("q_proj", "down_proj")),
    "dora": st.DoRA(of=st.LoRA(r=2, targets=("v_proj",))),
    "ia3": st.IA3(),
    "prompt_tuning": st.PromptTuning(tokens=3),
    "union": st.Union(of=(st.LoRA(r=2, targets=("q_proj",)), st.TrainableTokens(tokens=(5, 7)))),
    "classifier": st.LoRA(r=2, targets=("query",), train_modules=("classifier",)),
}


def filled(model: nn.Module) -> nn.Module:
    """Give every weight values that follow from its name alone."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            p.copy_(1 + 0.1 * drawn if p.dim() == 1 and not name.endswith("bias") else 0.2 * drawn)
    return model.eval()


def base(name: str) -> Any:
    """Return the base of one of the adapters."""
    if name == "classifier":
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return filled(BertForSequenceClassification(BertConfig(**small, vocab_size=32, max_position_embeddings=16)))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    return filled(LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=16, tie_word_embeddings=False)))


def tokens() -> Tensor:
    return torch.arange(14).view(2, 7) % 11 + 3


def make(folder: Path) -> None:
    """Write the adapters and what the models answer with them."""
    from safetensors.torch import save_file

    answers = {}
    for name, spec in SPECS.items():
        model = base(name)
        st.attach(model, spec, name=name)
        adapter = model.slim_state.adapters[name]
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            answers[name] = model(tokens()).logits
        st.save(model, folder / name, name=name)
        assert (answers[name] - base(name)(tokens()).logits).abs().max() > 0.01, name
    save_file(answers, folder / EXPECTED)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
