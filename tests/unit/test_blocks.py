"""Sub-blocks are found by what a layer is made of, and the input of one reaches its last layer whatever stands in between."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimtune as st
from slimtune.core.blocks import SubBlock, layers_of, resolve, sub_blocks
from slimtune.core.errors import MismatchError, SiteError
from slimtune.core.tap import Tap
from slimtune.testing import zoo
from slimtune.testing.subject import fill

# The layers of DINOv2 have ViT's names in later versions of transformers.
NEW_NAMES = any(path.endswith("attention.q_proj") for path, _ in zoo.dinov2().named_modules())
DINO = {"attention.o_proj" if NEW_NAMES else "attention.output.dense": "attention.q_proj" if NEW_NAMES else "attention.attention.query"}
DINO |= {"mlp.fc2": "mlp.fc1"}
ENDS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "Llama": (zoo.llama, {"self_attn.o_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.gate_proj"}),
    "Mixtral": (zoo.mixtral, {"self_attn.o_proj": "self_attn.q_proj", "mlp": "mlp"}),
    "GPT-2": (zoo.gpt2, {"attn.c_proj": "attn.c_attn", "mlp.c_proj": "mlp.c_fc"}),
    "BLOOM": (zoo.bloom, {"self_attention.dense": "self_attention.query_key_value", "mlp.dense_4h_to_h": "mlp.dense_h_to_4h"}),
    "BERT": (zoo.bert, {"attention.output.dense": "attention.self.query", "output.dense": "intermediate.dense"}),
    "DistilBERT": (zoo.distilbert, {"attention.out_lin": "attention.q_lin", "ffn.lin2": "ffn.lin1"}),
    "DeBERTa": (zoo.deberta, {"attention.output.dense": "attention.self.query_proj", "output.dense": "intermediate.dense"}),
    "ModernBERT": (zoo.modernbert, {"attn.Wo": "attn.Wqkv", "mlp.Wo": "mlp.Wi"}),
    "ViT": (zoo.vit, {"attention.o_proj": "attention.q_proj", "mlp.fc2": "mlp.fc1"}),
    "DINOv2": (zoo.dinov2, DINO),
    "wav2vec2": (zoo.wav2vec2, {"attention.out_proj": "attention.q_proj", "feed_forward.output_dense": "feed_forward.intermediate_dense"}),
    "DiT": (zoo.dit, {"attn1.to_out.0": "attn1.to_q", "ff.net.2": "ff.net.0.proj"}),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_layer_has_its_sub_blocks(name: str) -> None:
    make, ends = ENDS[name]
    blocks = sub_blocks(make())
    layers = layers_of(blocks)
    assert len(layers) >= 2
    assert [b.end for b in blocks] == [f"{layer}.{end}" for layer in layers for end in ends]
    assert [b.entrance for b in blocks] == [f"{layer}.{start}" for layer in layers for start in ends.values()]


@pytest.mark.parametrize("make", [zoo.bart, zoo.whisper])
def test_cross_attention_is_a_sub_block_of_its_own(make: Callable[[], nn.Module]) -> None:
    mine = [b for b in sub_blocks(make()) if b.end.startswith("model.decoder.layers.1.")]
    path = "model.decoder.layers.1."
    assert mine == [
        SubBlock("o", f"{path}self_attn.out_proj", f"{path}self_attn.q_proj"),
        SubBlock("o", f"{path}encoder_attn.out_proj", f"{path}encoder_attn.q_proj"),
        SubBlock("down", f"{path}fc2", f"{path}fc1"),
    ]


def test_t5_layers_are_the_blocks_not_the_parts_of_one() -> None:
    assert layers_of(sub_blocks(zoo.t5())) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_a_joint_attention_has_two_ends() -> None:
    blocks = {b.end: b.entrance for b in sub_blocks(zoo.flux())}
    assert blocks["transformer_blocks.0.attn.to_out.0"] == "transformer_blocks.0.attn.to_q"
    assert blocks["transformer_blocks.0.attn.to_add_out"] == "transformer_blocks.0.attn.add_q_proj"


def test_shared_experts_belong_to_the_mixture() -> None:
    model = zoo._hf(
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        shared_expert_intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, num_experts=4, vocab_size=99,
    )  # fmt: skip
    assert [b.end for b in sub_blocks(model)] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp"]
    report = st.attach(model, st.Parallel(reduction=4))
    assert [row.path for row in report.rows] == ["model.layers.0.mlp"]
    assert report.trainable == 8 * 32 * 2 + 8 + 32
    assert not report.notes
    fill(model, "default")
    model(input_ids=torch.arange(6).view(1, 6))


def test_targets_are_spelt_out() -> None:
    model = zoo.bert()
    assert resolve(model, ("o", "classifier")) == (
        r"re:bert\.encoder\.layer\.0\.attention\.output\.dense",
        r"re:bert\.encoder\.layer\.1\.attention\.output\.dense",
        "classifier",
    )
    assert resolve(model, "maybe:whole-layer") == (r"re:bert\.encoder\.layer\.0", r"re:bert\.encoder\.layer\.1")
    assert resolve(nn.Sequential(nn.Linear(2, 2)), "maybe:o") == ("maybe:o",)


def test_an_adapter_on_the_residual_stream() -> None:
    model = zoo.llama()
    report = st.attach(model, st.Bottleneck(targets="whole-layer", layers="last:1", reduction=4))
    assert [row.path for row in report.rows] == ["model.layers.2"]
    fill(model, "default")
    seen: list[Tensor] = []
    layer = model.get_submodule("model.layers.2")
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        hook = layer.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        with st.disabled(model):
            model(input_ids=ids)
        model(input_ids=ids)
        hook.remove()
        op = layer.slim.ops("default")[0]  # type: ignore[operator, union-attr]
        want = seen[0] + torch.relu(seen[0] @ op.down_w.T + op.down_b) @ op.up_w.T + op.up_b
    torch.testing.assert_close(seen[1], want)


# ---- taps -------------------------------------------------------------------------------------------------------------
class Layer(nn.Module):
    """A feed-forward whose two layers stand in the layer itself, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        if self.fail:
            raise KeyError("in between")
        return x + self.fc2(h)  # type: ignore[no-any-return]


def stacked(n: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*[Layer() for _ in range(n)]).double()
    st.attach(model, st.Parallel(reduction=2), name="a")
    st.attach(model, st.Parallel(reduction=3, scale=0.5), name="b")
    for name in "ab":
        fill(model, name, 0.5)
    st.use(model, "a")
    return model, torch.randn(4, 5, 6, dtype=torch.float64)


def by_hand(model: nn.Module, x: Tensor, name: str) -> Tensor:
    for layer in model:  # type: ignore[attr-defined]
        op = layer.fc2.slim.ops(name)[0]
        d = op.scale * (torch.relu(x @ op.down_w.T + op.down_b) @ op.up_w.T + op.up_b)
        h = torch.tanh(nn.functional.linear(x, layer.fc1.weight, layer.fc1.bias))
        x = x + nn.functional.linear(h, layer.fc2.weight, layer.fc2.bias) + d
    return x


def hooks(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() for h in m._forward_pre_hooks.values() if isinstance(h, Tap)]


def test_the_input_goes_from_the_first_layer_to_the_last() -> None:
    model, x = stacked()
    torch.testing.assert_close(model(x), by_hand(model, x, "a"))
    with st.use(model, rows=["a", "b", None, {"a": 0.25, "b": 2.0}]):
        mixed = model(x)
    torch.testing.assert_close(mixed[1], by_hand(model, x, "b")[1])
    with st.disabled(model):
        torch.testing.assert_close(mixed[2], model(x)[2])
    with st.use(model, {"a": 0.25, "b": 2.0}):
        torch.testing.assert_close(mixed[3], model(x)[3])


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, x = stacked()
    want = model(x)
    model[1].fail = True  # type: ignore[index]
    with pytest.raises(KeyError):
        model(x.flip(0))
    model[1].fail = False  # type: ignore[index]
    torch.testing.assert_close(model(x), want)


def test_threads_have_their_own() -> None:
    model, x = stacked(3)
    inputs = [x + i for i in range(6)]
    with torch.no_grad():
        want, got = [model(v) for v in inputs], {}
        barrier = threading.Barrier(len(inputs))

        def work(i: int) -> None:
            with torch.no_grad():
                barrier.wait()
                for _ in range(20):
                    got[i] = model(inputs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for i, w in enumerate(want):
        torch.testing.assert_close(got[i], w)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_passes_the_entrance_again(reentrant: bool) -> None:
    model, x = stacked()
    x.requires_grad_(True)
    params = list(model[0].fc2.slim.parameters())  # type: ignore[index, union-attr]
    live = [p for p in params if p.requires_grad]

    def grads(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), [x], retain_graph=True))

    want = grads(model(x))
    keep = st.keep_plan(model, checkpoint)
    out = keep(model, x, use_reentrant=reentrant)
    out.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want[0])
    assert all(p.grad is not None for p in live)


def test_hooks_go_with_the_last_adapter() -> None:
    model, _ = stacked()
    assert hooks(model) == ["0.fc1", "1.fc1"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for tap in twin[0].fc1._forward_pre_hooks.values():
            assert tap.slot is twin[0].fc2.slim
        st.detach(twin, "a")
        assert hooks(twin) == ["0.fc1", "1.fc1"]
        st.detach(twin, "b")
        assert hooks(twin) == []
    assert hooks(model) == ["0.fc1", "1.fc1"]


def test_an_input_that_never_passed_is_an_error() -> None:
    model, _ = stacked()
    with pytest.raises(SiteError, match=r"ran without 0\.fc1") as caught:
        model[0].fc2(torch.randn(4, 5, 10, dtype=torch.float64))  # type: ignore[index, operator]
    assert caught.value.where
    assert caught.value.hint


def test_tokens_that_differ_are_an_error() -> None:
    model, x = stacked(1)
    model[0].fc1(x)  # type: ignore[index, operator]
    with pytest.raises(SiteError, match="not of the same tokens"):
        model[0].fc2(torch.randn(2, 5, 10, dtype=torch.float64))  # type: ignore[index, operator]


def test_files_keep_the_entrance(tmp_path: Path) -> None:
    model, x = stacked()
    st.save(model, tmp_path / "a", name="a")
    torch.manual_seed(0)
    other = nn.Sequential(*[Layer() for _ in range(2)]).double()
    st.load(other, tmp_path / "a")
    torch.testing.assert_close(other(x), model(x))
    assert hooks(other) == ["0.fc1", "1.fc1"]


def test_a_file_with_an_entrance_that_is_not_there(tmp_path: Path) -> None:
    model, _ = stacked()
    model[0].fc2.slim.ops("a")[0].entrance = "0.fc9"  # type: ignore[index, union-attr, operator]
    st.save(model, tmp_path / "a", name="a")
    torch.manual_seed(0)
    other = nn.Sequential(*[Layer() for _ in range(2)]).double()
    with pytest.raises(MismatchError, match=r"0\.fc9"):
        st.load(other, tmp_path / "a")
    assert hooks(other) == []


def test_an_unknown_entrance_is_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(torch.tanh(self.first(x)))  # type: ignore[no-any-return]

    model = nn.Sequential(Odd())
    with pytest.raises(SiteError, match="is not known") as caught:
        st.attach(model, st.Parallel())
    assert "0.fc2" in caught.value.where
    report = st.attach(model, st.Parallel(targets="0"))  # the whole sub-block, by its own input
    assert [row.path for row in report.rows] == ["0"]
