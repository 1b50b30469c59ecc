"""AdaLoRA beside the reference library: the same choices at every step, and files in both directions, outputs equal to 1e-5."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import FormatError, MismatchError
from slimtune.core.state import state_of

warnings.filterwarnings("ignore")

IDS = torch.arange(24).reshape(4, 6) % 13
TOTAL, T_INIT, T_FINAL, EVERY = 24, 3, 6, 2
SPEC = st.AdaLoRA(
    init_r=6, target_r=3, alpha=8, t_init=T_INIT, t_final=T_FINAL, delta_t=EVERY, total_steps=TOTAL, targets=("q_proj", "v_proj", "down_proj")
)


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=13, max_position_embeddings=16, num_hidden_layers=2,
        intermediate_size=24,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def to_train(model: nn.Module) -> list[nn.Parameter]:
    """What is meant to train: version 0.21.2 of the reference also lets the optimiser move `ranknum`, which its files do not hold."""
    return [p for key, p in model.named_parameters() if p.requires_grad and "ranknum" not in key]


def ops(model: nn.Module, name: str = "default") -> dict[str, Any]:
    return {path: op for (path, _), op in state_of(model).adapters[name].ops.items()}


def twins() -> tuple[Any, Any]:
    """The reference's model and ours with the same factors."""
    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "down_proj"], init_r=6, target_r=3, lora_alpha=8, tinit=T_INIT, tfinal=T_FINAL, deltaT=EVERY,
        total_step=TOTAL, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs, ours = peft.get_peft_model(llama(), config), llama()
    st.attach(ours, SPEC)
    for path, op in ops(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        for name in ("A", "B", "E"):
            its = getattr(layer, f"lora_{name}")["default"]
            its.data = its.data.double()
            with torch.no_grad():
                its.copy_(getattr(op, name))
        layer.ranknum["default"].data = layer.ranknum["default"].data.double()
    return theirs, ours


def test_the_same_choices_as_the_reference_at_every_step() -> None:
    theirs, ours = twins()
    a = torch.optim.AdamW(to_train(theirs), lr=2e-2)
    b = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=2e-2)
    budgets = []
    for t in range(1, TOTAL + 1):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        a.step()
        theirs.base_model.update_and_allocate(t)
        a.zero_grad()
        ours(IDS, labels=IDS).loss.backward()
        b.step()
        b.zero_grad()
        for path, op in ops(ours).items():
            E = theirs.base_model.model.get_submodule(path).lora_E["default"]
            assert torch.equal(E == 0, op.E == 0), f"step {t}: {path} was pruned otherwise"
            torch.testing.assert_close(op.E, E, rtol=1e-6, atol=1e-9)
        budgets.append(sum(int(op.chosen.sum()) for op in ops(ours).values()))
    full, last = 6 * 6, 6 * 3
    assert budgets[:T_INIT] == [full] * T_INIT
    assert budgets[TOTAL - T_FINAL - 1 :] == [last] * (T_FINAL + 1)
    assert budgets == sorted(budgets, reverse=True)
    pattern = theirs.peft_config["default"].rank_pattern
    assert {k: sum(v) for k, v in pattern.items()} == {f"{p}.lora_E.default": op.rank_now() for p, op in ops(ours).items()}
    assert len({op.rank_now() for op in ops(ours).values()}) > 1, "every site got the same rank: nothing was allocated"


def test_the_penalty_is_the_reference_s() -> None:
    theirs, ours = twins()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    loss = ours(IDS, labels=IDS).loss
    loss.backward()
    assert torch.allclose(loss, theirs.base_model.model(input_ids=IDS, labels=IDS).loss), "the logged loss is without the penalty"
    torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.0).step()
    for path, op in ops(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        for name in ("A", "B", "E"):
            torch.testing.assert_close(getattr(op, name).grad, getattr(layer, f"lora_{name}")["default"].grad, rtol=1e-6, atol=1e-12)


# ---- files ------------------------------------------------------------------------------------------------------------
class Pictures(nn.Module):
    """A convolution, a Conv1D and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.mix = transformers.pytorch_utils.Conv1D(5, 6)
        self.score = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv((ids.to(self.conv.weight.dtype) / 13)[:, None, :, None])  # [n, 6, t, 1]
        return self.score(torch.tanh(self.mix(h.squeeze(-1).transpose(1, 2).contiguous())))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return Pictures().double()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=13, max_position_embeddings=16
    )
    return transformers.BertForSequenceClassification(config).double()


CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "regex, layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "alpha, dropout": (llama, {"target_modules": ["up_proj"], "lora_alpha": 3, "lora_dropout": 0.1, "beta1": 0.9, "orth_reg_weight": 0.1}),
    "alpha 0": (llama, {"target_modules": ["up_proj"], "lora_alpha": 0}),
    "conv and Conv1D": (pictures, {"target_modules": ["conv", "mix"], "modules_to_save": ["score"], "fan_in_fan_out": True}),
    "classifier, biases": (bert, {"target_modules": ["query", "value"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
}


def output(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def trained(name: str, steps: int) -> tuple[Any, Any]:
    """A model of the reference after some steps of a schedule of 8, and how to make its base."""
    make, options = CASES[name]
    config = peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8, **options})
    model = peft.get_peft_model(make(), config)
    torch.manual_seed(3)
    for key, p in model.named_parameters():
        if p.requires_grad and "lora_" in key:
            torch.nn.init.normal_(p, std=0.5)
    optimiser = torch.optim.AdamW(to_train(model), lr=5e-2)
    for t in range(1, steps + 1):
        out = model(IDS)
        (out if isinstance(out, Tensor) else out.logits).square().mean().backward()
        optimiser.step()
        model.base_model.update_and_allocate(t)
        optimiser.zero_grad()
    return model, make


@pytest.mark.parametrize("steps", [0, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_its_files_here_and_ours_there(name: str, steps: int, tmp_path: Path) -> None:
    theirs, make = trained(name, steps)
    want = output(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = output(peft.PeftModel.from_pretrained(make(), tmp_path / "theirs"))
    ours = make()
    st.load(ours, tmp_path / "theirs")
    assert (output(ours) - output(make())).abs().max() > 1e-3, "the adapter does nothing"
    torch.testing.assert_close(output(ours), again, rtol=0, atol=1e-5)
    if name != "alpha 0" or steps == 0:  # its own saving changes the scale of pruned sites with alpha 0
        torch.testing.assert_close(output(ours), want, rtol=0, atol=1e-5)
    st.save(ours, tmp_path / "ours")
    if name == "alpha 0" and steps:  # its scales differ from site to site then, which no config of the reference can say
        assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "SLIMTUNE_ADALORA"
        return
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(output(back), output(ours), rtol=0, atol=1e-5)
    a, b = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours"))
    assert b["peft_type"] == "ADALORA"
    assert a["rank_pattern"] == b["rank_pattern"]
    same = ["init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2", "orth_reg_weight", "bias", "lora_dropout"]
    assert {k: a[k] for k in same} == {k: b[k] for k in same}


@pytest.mark.parametrize("steps", [0, 10, TOTAL])
def test_what_we_trained_there(steps: int, tmp_path: Path) -> None:
    model = llama()
    st.attach(model, SPEC)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    st.save(model, tmp_path)
    there = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(output(there), output(model), rtol=0, atol=1e-5)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    if steps == TOTAL:
        assert sum(map(sum, pattern.values())) == 18
        assert {p.removesuffix(".lora_E"): sum(v) for p, v in pattern.items()} == st.report(model).ranks()


def test_what_it_cannot_hold_keeps_our_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 3))
    st.attach(model, st.AdaLoRA(init_r=4, target_r=2, targets=("0", "1")))
    st.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SLIMTUNE_ADALORA"


def test_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    theirs, make = trained("llama", 8)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    key = next(iter(config["rank_pattern"]))
    for change, error in (
        ({"rank_pattern": {**config["rank_pattern"], key: [True] * 4}}, MismatchError),
        ({"rank_pattern": {key: "all"}}, FormatError),
        ({"init_r": 0}, FormatError),
        ({"beta1": 2}, FormatError),
        ({"use_dora": True}, FormatError),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(error):
            st.load(make(), tmp_path)
