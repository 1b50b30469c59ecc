"""Initialisers from data, and QA-LoRA's arithmetic, beside the reference library on the same data."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import output
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import slimtune as st
from slimtune.core.state import state_of
from slimtune.testing.zoo import gpt2, llama

MODELS = {"llama": (llama, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_fc"])}


def data(n: int, rows: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        ids = torch.randint(3, 99, (rows, 24), generator=g)
        mask = torch.ones_like(ids)
        mask[1:, 20:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :6] = -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def ours(name: str, batches: list[dict[str, Tensor]], **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    make, targets = MODELS[name]
    model = make()
    st.attach(model, st.LoRA(r=4, alpha=8, targets=tuple(targets), **options), data=batches)
    return model, {path: op for (path, _), op in state_of(model).adapters["default"].ops.items()}


def theirs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        n.removeprefix("base_model.model."): (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach())
        for n, m in model.named_modules()
        if hasattr(m, "lora_A")
    }


def config(name: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODELS[name][1], fan_in_fan_out=name == "gpt2", **options)


def cosine(A: Tensor, B: Tensor) -> float:
    """Return the cosine of the largest principal angle between two sets of rows."""
    return float(torch.linalg.svdvals(torch.linalg.qr(A.detach().double().T)[0].T @ torch.linalg.qr(B.double().T)[0]).min())


@pytest.mark.parametrize("name", MODELS)
def test_eva(name: str) -> None:
    """Equal ranks, and directions as equal as two different truncations of an incremental SVD can be (the reference goes round and round)."""
    _, mine = ours(name, data(3, 4), init="eva")
    wanted = config(name, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.999))
    found = peft.get_eva_state_dict(MODELS[name][0](), data(3, 4), wanted, show_progress_bar=False)
    ranks = {k: len(v) for k, v in found.items() if len(v)}
    assert sum(ranks.values()) == sum(op.r for op in mine.values())
    assert sum(abs(ranks.get(k, 0) - op.r) for k, op in mine.items()) <= 2
    for k, v in found.items():
        r = min(len(v), mine[k].r if k in mine else 0)
        if r:
            assert cosine(mine[k].A[:r], v[:r]) > 0.9, k


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time is all the reference takes; over several it weighs each by its largest entry, which the paper does not."""
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # all it needs of attrs, which is not here
    from peft.tuners.lora.corda import preprocess_corda

    batch = data(1, 1)
    _, mine = ours(name, batch, init="corda" if mode == "ipm" else "corda_kpm")
    wanted = config(name, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    model = MODELS[name][0]()
    preprocess_corda(model, wanted, run_model=lambda: model(**batch[0]))
    for k, (A, B) in theirs(peft.get_peft_model(model, wanted)).items():
        assert cosine(mine[k].A, A) > 0.9999, k
        assert cosine(mine[k].B.T, B.T) > 0.9999, k
        assert (mine[k].B @ mine[k].A - B @ A).norm() < 1e-3 * (B @ A).norm(), k


@pytest.mark.parametrize("name", MODELS)
def test_lora_ga(name: str) -> None:
    """The same directions; the sizes differ: ours are the paper's, the reference's B carries the singular values."""
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    batches = data(2, 4)
    _, mine = ours(name, batches, init="lora_ga")
    wanted = config(name, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    model = MODELS[name][0]()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # the reference runs in training mode

    def step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, wanted, step)
    for k, (A, B) in theirs(peft.get_peft_model(model, wanted)).items():
        assert cosine(mine[k].A, A) > 0.999, k
        assert cosine(mine[k].B.T, B.T) > 0.999, k


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_their_files(name: str, init: str, tmp_path: Path) -> None:
    """Ours load in the reference with equal logits: what starts away from zero as a LoRA of twice the rank."""
    model, mine = ours(name, data(3, 4), init=init)
    with torch.no_grad():
        for op in mine.values():
            for p in op.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    want = output(model)
    st.save(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(MODELS[name][0](), str(tmp_path / "ours")).eval()
    assert (output(loaded) - want).abs().max() < 1e-5
    ranks = {k: len(A) for k, (A, _) in theirs(loaded).items()}
    assert ranks == {k: op.r * (1 if init == "eva" else 2) for k, op in mine.items()}
    other = MODELS[name][0]()
    st.load(other, tmp_path / "ours")
    assert (output(other) - want).abs().max() < 1e-5


def test_qa_lora_is_the_references_up_to_its_factor() -> None:
    """The reference averages and multiplies with the number of groups a / g, so its s is ours times g / a."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    a, b, g, r, s = 24, 10, 4, 3, 0.5
    model = nn.Sequential(nn.Linear(a, b))
    st.attach(model, st.QALoRA(r=r, alpha=r * s * a / g, group=g, pool="mean"))
    (op,) = state_of(model).adapters["default"].ops.values()
    nn.init.normal_(op.B)
    layer = types.SimpleNamespace(
        lora_A={"x": types.SimpleNamespace(weight=op.A)}, lora_B={"x": types.SimpleNamespace(weight=op.B)}, lora_dropout={"x": nn.Identity()},
        scaling={"x": s}, qalora_group_size={"x": g}, training=False, in_features=a,
    )  # fmt: skip
    x = torch.randn(2, 5, a)
    with st.disabled(model):
        base = model(x)
    torch.testing.assert_close(model(x), QALoraLinearVariant.forward(layer, "x", x, base))


def test_a_qa_lora_file_of_the_reference_is_read(tmp_path: Path) -> None:
    """The reference writes one on a GPTQ model; here it is made of its own LoRA file, with the factor's inputs pooled as its variant has them."""
    from peft.tuners.lora.variants import QALoraLinearVariant
    from safetensors.torch import load_file, save_file

    g, targets = 8, ["q_proj", "down_proj"]
    wanted = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_qalora=True, qalora_group_size=g, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5}
    )
    live = peft.get_peft_model(llama(), wanted)
    torch.manual_seed(0)
    hooks = {}
    for path, m in live.named_modules():
        if hasattr(m, "lora_A"):
            A, B = m.lora_A["default"], m.lora_B["default"]
            pooled = nn.Parameter(0.02 * torch.randn(A.weight.shape[0], A.weight.shape[1] // g))
            hooks[path] = (m, pooled)
            nn.init.normal_(B.weight, std=0.1)
            layer = types.SimpleNamespace(
                lora_A={"x": types.SimpleNamespace(weight=pooled)}, lora_B={"x": B}, lora_dropout={"x": nn.Identity()},
                scaling={"x": m.scaling["default"]}, qalora_group_size={"x": g}, training=False, in_features=m.in_features,
            )  # fmt: skip
            base = m.base_layer
            m.forward = lambda x, layer=layer, base=base: QALoraLinearVariant.forward(layer, "x", x, base(x))
    want = output(live.eval())
    live.save_pretrained(str(tmp_path / "theirs"))
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    for path, (_, pooled) in hooks.items():
        tensors[f"{path}.lora_A.weight"] = pooled.detach()
    save_file(tensors, file, metadata={"format": "pt"})

    model = llama()
    assert (output(model) - want).abs().max() > 1e-3
    report = st.load(model, tmp_path / "theirs")
    assert report.method == "qa_lora"
    assert (output(model) - want).abs().max() < 1e-5
    st.save(model, tmp_path / "ours")
    again = llama()
    st.load(again, tmp_path / "ours")
    assert torch.equal(output(again), output(model))


def test_the_flag_does_nothing_on_layers_that_are_not_gptq(tmp_path: Path) -> None:
    live = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_qalora=True, qalora_group_size=8))
    for n, p in live.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.1)
    want = output(live.eval())
    live.save_pretrained(str(tmp_path))
    model = llama()
    assert st.load(model, tmp_path).method == "lora"
    assert (output(model) - want).abs().max() < 1e-5
