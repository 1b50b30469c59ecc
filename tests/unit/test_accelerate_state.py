"""Hand-written loops: accelerate's save_state, torch.save, averaged weights and offloading carry the adapter, and loading is strict."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.registry import spec_class
from slimtune.testing import zoo as tiny
from slimtune.testing.cases import case
from slimtune.testing.subject import Subject
from slimtune.testing.suite import expected_problem

IDS = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(1))
SPECS = {
    "lora": st.LoRA(r=2),
    "dora": st.DoRA(),
    "prompt": st.PromptTuning(tokens=3),
    "vera": st.VeRA(r=4),
    "adalora": st.AdaLoRA(init_r=4, target_r=2, total_steps=8, t_init=1, t_final=2, delta_t=1),
    "progressive": st.ProgressiveLoRA(every=1),
    "delta": st.DeltaLoRA(r=2, start=1),
}


def attached(spec: st.Spec, name: str = "default", seed: int = 0) -> nn.Module:
    model = tiny.llama()
    torch.manual_seed(seed)
    st.attach(model, spec, name=name)
    return model


def steps(model: Any, optimizer: Any, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        torch.manual_seed(i)
        ids = torch.randint(0, 90, (2, 7))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if ".slim." in k}


def same(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = tensors(a), tensors(b)
    assert mine
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key
    assert a.slim_state.adapters["default"].steps == b.slim_state.adapters["default"].steps  # type: ignore[union-attr, index]


# ---- accelerate ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("safe", [True, False])
def test_save_state_and_load_state(name: str, safe: bool, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def begun(seed: int) -> tuple[Accelerator, Any, Any]:
        model = attached(SPECS[name], seed=seed)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, adam(model))

    accelerator, whole, optimizer = begun(seed=0)
    steps(whole, optimizer, 3)
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    steps(whole, optimizer, 3, first=3)
    accelerator.free_memory()
    accelerator, again, optimizer = begun(seed=1)  # another random start: all must come from the file
    accelerator.load_state(str(tmp_path))
    steps(again, optimizer, 3, first=3)
    same(whole, again)


def test_adapters_that_come_after_prepare(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.llama())
    st.attach(model, st.LoRA(r=2))
    optimizer = accelerator.prepare(adam(model))
    steps(model, optimizer, 2)
    accelerator.save_state(str(tmp_path))
    kept = copy.deepcopy(model)
    steps(model, optimizer, 2)
    accelerator.load_state(str(tmp_path))
    same(model, kept)


def test_a_state_of_the_base_alone_is_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(tiny.llama())
    accelerator.save_state(str(tmp_path))
    st.attach(model, st.LoRA(r=2))
    with pytest.raises(RuntimeError, match=r"Missing key.*slim\.default"):
        accelerator.load_state(str(tmp_path))


def test_accelerate_saves_a_model_with_its_adapter(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from safetensors.torch import load_file

    model = attached(st.LoRA(r=2))
    Accelerator(cpu=True).save_model(model, str(tmp_path))
    assert tensors(model).keys() <= load_file(tmp_path / "model.safetensors").keys()


# ---- torch --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SPECS))
def test_torch_save_and_load(name: str, tmp_path: Path) -> None:
    whole = attached(SPECS[name])
    steps(whole, adam(whole), 3)
    torch.save(whole.state_dict(), tmp_path / "model.pt")
    again = attached(SPECS[name], seed=1)
    result = again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    same(whole, again)
    assert torch.equal(whole.eval()(IDS).logits, again.eval()(IDS).logits)


def test_a_state_dict_may_be_assigned() -> None:
    whole, again = attached(st.LoRA(r=2)), attached(st.LoRA(r=2), seed=1)
    steps(whole, adam(whole), 2)
    before = again.eval()(IDS).logits
    again.load_state_dict(whole.state_dict(), assign=True)
    same(whole, again)
    assert torch.equal(again(IDS).logits, whole.eval()(IDS).logits)
    assert not torch.equal(again(IDS).logits, before)


def test_loading_is_strict_about_adapters() -> None:
    one, other, plain = attached(st.LoRA(r=2)), attached(st.LoRA(r=2), name="other"), tiny.llama()
    with pytest.raises(RuntimeError, match=r"Missing key.*slim\.other[\s\S]*Unexpected key.*slim\.default"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*slim\.default"):
        plain.load_state_dict(one.state_dict())
    plain.load_state_dict(base_state_dict(one))
    with pytest.raises(RuntimeError, match="size mismatch"):
        attached(st.LoRA(r=3)).load_state_dict(one.state_dict())
    ada = attached(SPECS["adalora"])
    broken = {k: torch.zeros(8, dtype=torch.uint8) if k.endswith("_extra_state") else v for k, v in ada.state_dict().items()}
    with pytest.raises(RuntimeError, match="does not fit adapter 'default'"):
        ada.load_state_dict(broken)


def test_a_merged_model_is_what_its_weights_say() -> None:
    model = attached(st.LoRA(r=2))
    steps(model, adam(model), 2)
    st.attach(model, st.LoRA(r=1), name="second")
    carried = model.state_dict()
    out = model.eval()(IDS).logits if st.use(model, "default") else None
    st.merge(model, "default")
    merged = model.state_dict()
    kept = {k: v.clone() for k, v in merged.items()}
    assert not [k for k in merged if ".slim.default." in k], "its effect would count twice"
    assert [k for k in merged if ".slim.second." in k], "this one is not in the weights"
    assert not model.load_state_dict(merged).missing_keys
    plain = tiny.llama().eval()
    plain.load_state_dict(base_state_dict(model))
    torch.testing.assert_close(plain(IDS).logits, out, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="merged into the weights now"):
        model.load_state_dict(carried)
    with pytest.raises(st.MergeError, match="undo the change first"):  # torch has written the base's values before it said so
        st.unmerge(model)
    model.load_state_dict(kept)
    st.unmerge(model)
    model.load_state_dict(carried)
    with pytest.raises(RuntimeError, match=r"Missing key.*slim\.default"):
        model.load_state_dict(merged)


def test_tensors_that_are_saved_are_those_that_live() -> None:
    """Names lead to the parameters themselves, as distributed checkpoints expect."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    for name, spec in SPECS.items():
        whole, again = attached(spec), attached(spec, seed=1)
        steps(whole, adam(whole), 2)
        found = get_model_state_dict(whole)
        assert tensors(whole).keys() <= found.keys(), name
        set_model_state_dict(again, {k: v.clone() for k, v in found.items()})
        same(whole, again)


# ---- averages -----------------------------------------------------------------------------------------------------------
def test_averaged_models_have_averaged_adapters() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = attached(st.LoRA(r=2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = adam(model)
    wanted = None
    for i in range(3):
        steps(model, optimizer, 1, first=i)
        average.update_parameters(model)
        now = {k: v.double() for k, v in tensors(model).items()}
        wanted = now if wanted is None else {k: 0.5 * wanted[k] + 0.5 * v for k, v in now.items()}
    assert wanted is not None
    for key, value in tensors(average.module).items():
        torch.testing.assert_close(value.double(), wanted[key], atol=1e-6, rtol=1e-6)
    assert not torch.equal(average(IDS).logits, model(IDS).logits)
    other = AveragedModel(attached(st.LoRA(r=2), seed=1))
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.eval()(IDS).logits, average.eval()(IDS).logits)


def test_averages_over_state_dicts() -> None:
    """As timm's ModelEmaV2 and many scripts do: a deep copy, and a loop over both state dicts."""
    model = attached(st.LoRA(r=2))
    start = tensors(model)
    average = copy.deepcopy(model)
    optimizer = adam(model)
    for i in range(2):
        steps(model, optimizer, 1, first=i)
        with torch.no_grad():
            for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(0.9 * mine + 0.1 * theirs)
    now, end = tensors(average), tensors(model)
    up = next(k for k in now if k.endswith(".B"))
    assert not torch.equal(now[up], start[up])
    assert not torch.equal(now[up], end[up])


def test_diffusers_average() -> None:
    from diffusers.training_utils import EMAModel

    model = attached(st.LoRA(r=2))
    average = EMAModel(model.parameters(), decay=0.5, use_ema_warmup=False)
    optimizer = adam(model)
    for i in range(3):
        steps(model, optimizer, 1, first=i)
        average.step(model.parameters())
    before = tensors(model)
    average.store(model.parameters())
    average.copy_to(model.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in tensors(model).items())
    average.restore(model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tensors(model).items())


# ---- what the user has set ----------------------------------------------------------------------------------------------
def downs(model: Any, name: str = "a") -> list[nn.Parameter]:
    return [op.A for op in model.slim_state.adapters[name].ops.values()]


def test_what_was_frozen_by_hand_stays_frozen() -> None:
    model = attached(st.LoRA(r=2), name="a")
    for p in downs(model):
        p.requires_grad_(False)
    st.attach(model, st.LoRA(r=2), name="b")
    assert not any(p.requires_grad for p in model.slim_state.adapters["a"].parameters())
    st.use(model, "a")
    assert not any(p.requires_grad for p in downs(model))
    assert all(op.B.requires_grad for op in model.slim_state.adapters["a"].ops.values())
    st.trainable(model, ["a", "b"])
    assert not any(p.requires_grad for p in downs(model))
    assert all(p.requires_grad for p in downs(model, "b"))
    with st.use(model, "b"):
        pass
    twin = copy.deepcopy(model)
    for each in (model, twin):
        st.use(each, None)
        st.use(each, "a")
        assert not any(p.requires_grad for p in downs(each))
    for p in downs(model):
        p.requires_grad_(True)
    st.use(model, "b")
    st.use(model, "a")
    assert all(p.requires_grad for p in downs(model)), "and what was thawed by hand trains"


def test_an_adapter_frozen_altogether() -> None:
    model = attached(st.LoRA(r=2), name="a")
    for p in model.slim_state.adapters["a"].parameters():
        p.requires_grad_(False)
    st.attach(model, st.LoRA(r=2), name="b")
    st.use(model, "a")
    assert not trainable(model)
    st.trainable(model, "a")  # the word for it
    assert all(p.requires_grad for p in model.slim_state.adapters["a"].parameters())


# ---- every method -------------------------------------------------------------------------------------------------------
CELLS = [
    Subject(spec, cell)
    for spec in (spec_class(name)() for name in st.methods())
    for cell in map(case, ("Llama", "group 4-bit", "experts", "conv2d"))
    if not expected_problem(Subject(spec, cell))
]


@pytest.mark.parametrize("s", CELLS, ids=lambda s: f"{s.spec.method}-{s.case.name}")
def test_the_state_dict_of_every_method_is_the_whole_adapter(s: Subject) -> None:
    whole, again = s.attached("a"), s.attached("a", busy=False)
    assert not torch.equal(s.out(whole), s.out(again))
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert torch.equal(s.out(whole), s.out(again))
    st.detach(again, "a")
    assert not [k for k in again.state_dict() if ".slim." in k]
