"""A frozen base's running statistics stay still while adapters train, so that a reload gives the same answers."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import slimtune as st
from slimtune.core.errors import MismatchError


def net(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 20) -> None:
    model.train()
    optimizer = torch.optim.AdamW(st.param_groups(model, lr=0.05))
    for _ in range(steps):
        out = model(x)
        F.cross_entropy(out if isinstance(out, Tensor) else out.logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8) * 3 + 2, torch.randint(0, 3, (16,))


def instance_norm(n: int) -> nn.Module:
    return nn.InstanceNorm2d(n, affine=True, track_running_stats=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm, nn.SyncBatchNorm], ids=lambda f: f.__name__)
def test_an_adapter_on_a_network_with_running_statistics_gives_the_same_after_reload(norm: Any, tmp_path: Path) -> None:
    x, y = images()
    model = net(norm)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = st.attach(model, st.LoRA(r=2, targets=("0", "5")))
    assert "running statistics" in str(report)
    trained(model, x, y)
    for name, b in before.items():
        assert torch.equal(model.state_dict()[name], b), name
    want = model(x)
    st.save(model, tmp_path)
    again = net(norm).eval()
    assert "running statistics" in str(st.load(again, tmp_path))
    torch.testing.assert_close(again(x), want, rtol=1e-5, atol=1e-5)
    st.merge(again, keep=False)
    torch.testing.assert_close(again(x), want, rtol=1e-3, atol=1e-4)
    assert type(again[1]) is type(norm(8))


def test_a_resnet_of_transformers_gives_the_same_after_reload(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        return ResNetForImageClassification(config).eval()

    x, y = torch.randn(8, 3, 16, 16) + 1, torch.randint(0, 3, (8,))
    model = build()
    st.attach(model, st.LoRA(r=2, targets=("convolution",), train_modules=("classifier.1",)))
    trained(model, x, y, steps=5)
    st.save(model, tmp_path)
    again = build()
    st.load(again, tmp_path)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


def test_detach_gives_the_norm_its_class_and_the_mode_of_the_model_back() -> None:
    model = net().train()
    st.attach(model, st.LoRA(r=2, targets=("5",)))
    assert not model[1].training
    model.train()
    assert not model[1].training
    twin: Any = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert not twin.train()[1].training
    st.detach(model, "default")
    assert model[1].training
    assert type(model[1]) is nn.BatchNorm2d
    mean = model[1].running_mean.clone()
    model(images()[0])
    assert not torch.equal(model[1].running_mean, mean)


def test_any_other_module_whose_buffers_move_is_found_in_its_first_training_forward(tmp_path: Path) -> None:
    class Average(nn.Module):
        """As the codebooks of audio models: an average that moves with the data."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("center", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.center.lerp_(x.detach().mean(0), 0.5)
            return x - self.center

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Average(), nn.Linear(8, 2))
    base = copy.deepcopy(model)
    st.attach(model, st.LoRA(r=2))
    with pytest.warns(UserWarning, match=r"1 \(Average\) changes its own center"):
        trained(model, torch.randn(6, 4), torch.randint(0, 2, (6,)), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, torch.randn(6, 4), torch.randint(0, 2, (6,)), steps=3)
    assert torch.equal(model[1].center, base[1].center)
    assert not model[1]._forward_hooks
    assert "Average" in str(st.report(model))
    st.save(model, tmp_path)
    again = base.eval()
    st.load(again, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    st.detach(model, "default")
    assert type(model[1]) is Average
    assert not model[1]._forward_pre_hooks


def test_the_vectors_of_a_spectral_norm_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 2)).train()
    st.attach(model, st.LoRA(r=2, targets=("1",)))
    before = {k: v.clone() for k, v in model.named_buffers()}
    with pytest.warns(UserWarning, match="SpectralNorm"):
        trained(model, torch.randn(6, 4), torch.randint(0, 2, (6,)), steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers() if k in before)


def test_statistics_of_another_base_are_noticed(tmp_path: Path) -> None:
    model = net()
    st.attach(model, st.LoRA(r=2, targets=("5",)))
    st.save(model, tmp_path)
    other = net()
    other[1].running_mean.add_(0.5)
    with pytest.raises(MismatchError, match="running_mean"):
        st.load(other, tmp_path)
    assert any("running_mean" in n for n in st.load(other, tmp_path, relax="base").notes)
    st.load(net().double(), tmp_path)


def test_a_norm_that_the_reference_trained_in_full_is_not_read_onto_another(tmp_path: Path) -> None:
    """After peft 1732 and PR 3481: a batch norm among modules_to_save, with its running statistics."""
    import peft
    import safetensors.torch

    x, y = images()
    theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "5"], modules_to_save=["1"], init_lora_weights=False))
    theirs.train()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    theirs.eval()
    want = theirs(x)
    theirs.save_pretrained(tmp_path)
    model = net().eval()
    with pytest.raises(MismatchError, match=r"batch norms(.|\n)*1\.") as found:
        st.load(model, tmp_path)
    eval(found.value.hint.partition("then load: ")[2], {"model": model, "safetensors": safetensors})  # as the hint says
    st.load(model, tmp_path)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
