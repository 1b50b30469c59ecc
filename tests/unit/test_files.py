"""Saving and loading one adapter: exact, deterministic, strict, cheap; merged checkpoints on disk."""

from __future__ import annotations

import cProfile
import gc
import hashlib
import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimtune as st
from slimtune.algebra.merge_to_disk import merge_to_disk
from slimtune.core.errors import FileError, MergeError, MismatchError, NameInUse, NoSuchAdapter
from slimtune.core.op import Op
from slimtune.core.site import Site
from slimtune.files.layouts.patterns import from_key, from_suffix, named_by, to_pattern, to_targets
from slimtune.files.layouts.reference import task_type

IDS = torch.arange(12).reshape(2, 6)


def llama(layers: int = 3, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 13}
    return LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=layers, **options)).eval()


def mlp(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def shaken(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.slim_state.adapters[name].parameters():
            p.normal_(std=0.2)
    return model


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


SPECS = {
    "lora": st.LoRA(r=4),
    "lora and a head": st.LoRA(r=4, train_modules="lm_head"),
    "bottleneck": st.Bottleneck(reduction=4),
    "bitfit": st.BitFit(),
    "dense": st.Dense(targets=("lm_head", "layers.1.mlp.up_proj")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_same_output_and_same_bytes(spec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama().to(dtype)
    st.attach(model, SPECS[spec], name="mine")
    shaken(model, "mine")
    st.save(model, tmp_path / "a")
    loaded = llama().to(dtype)
    report = st.load(loaded, tmp_path / "a")
    assert report.name == "mine"
    assert (out(loaded) - out(model)).abs().max() <= (1e-6 if dtype == torch.float32 else 0.05 if "d" in spec else 0)
    assert loaded.slim_state.adapters["mine"].spec == SPECS[spec]
    st.save(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@st.register("test_gate")
@dataclass(frozen=True, kw_only=True)
class Gate(st.Spec):
    """A method from outside, with a nested module, a shared tensor, a buffer, and a setting."""

    groups: int = 2

    def build(self, site: Site) -> GateOp:
        return GateOp(site, self.groups)


class GateOp(Op):
    roles = {"gain": "gain"}

    def __init__(self, site: Site, groups: int) -> None:
        super().__init__(site)
        self.groups = groups
        self.gain = nn.Parameter(torch.zeros(groups, dtype=site.dtype))
        self.inner = nn.Linear(groups, 1, dtype=site.dtype)
        self.shared = site.shared.setdefault("bank", nn.Parameter(torch.zeros(100, dtype=site.dtype)))
        self.register_buffer("steps", torch.zeros(1))

    def run(self, x: Tensor, y: Tensor, host: nn.Module) -> Tensor:
        return y * (self.gain.mean() + self.inner(self.gain) + self.shared.mean() + self.steps)

    def settings(self) -> dict[str, Any]:
        return {"groups": self.groups}


def test_a_method_from_outside_needs_no_code_for_files(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, Gate(groups=3))
    shaken(model)
    for op in model.slim_state.adapters["default"].ops.values():
        op.steps.fill_(0.5)
    st.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["peft_type"] == "SLIMTUNE_TEST_GATE"
    from safetensors.torch import load_file

    names = list(load_file(tmp_path / "a/adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.mlp.up_proj.test_gate_inner.weight" in names
    assert sum(n.endswith("test_gate_shared") for n in names) == 1  # one tensor for all
    loaded = llama()
    st.load(loaded, tmp_path / "a")
    assert torch.equal(out(loaded), out(model))
    ops = list(loaded.slim_state.adapters["default"].ops.values())
    assert ops[0].shared is ops[-1].shared
    st.save(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


_WRITE = """
import sys, torch, slimtune as st
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
st.attach(model, st.LoRA(r=2, rank_pattern={"1": 3, "3": 5}, alpha_pattern={"2": 1.0}, train_modules=("0",), targets=("1", "2", "3")), name="x")
for p in model.slim_state.adapters["x"].parameters(): p.data.normal_()
st.save(model, sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", _WRITE, str(tmp_path / seed)], check=True, env=env)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_nothing_but_the_reference_fields_in_a_shared_config(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = mlp()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    assert "slimtune" not in (tmp_path / "adapter_config.json").read_text()
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["format"] == "pt"
    about = json.loads(metadata["slimtune"])
    assert about["spec"]["method"] == "lora"
    assert about["fingerprint"]["structure"]["*.weight"] == {"8x8": 2}


def test_what_else_stands_in_the_folder_stays(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    (tmp_path / "a/checkpoint").mkdir(parents=True)
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/checkpoint/x").write_text("y")
    st.save(model, tmp_path / "a")
    (tmp_path / "a/README.md").write_text("my own words")
    st.detach(model, "default")
    st.attach(model, st.LoRA(r=3))
    st.save(model, tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "my own words"
    assert (tmp_path / "a/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "a/checkpoint/x").read_text() == "y"
    assert st.load(mlp(), tmp_path / "a").rows[0].total == 3 * 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_link_to_a_folder_is_followed_and_kept(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path / "real")
    os.symlink("real", tmp_path / "link")
    shaken(model)
    st.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(st.load(m := mlp(), tmp_path / "real") and m(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_where_a_folder_cannot_be_made(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(FileError):
            st.save(model, folder)
    assert (tmp_path / "file").read_text() == "x"


def test_which_adapter_is_saved(tmp_path: Path) -> None:
    model = mlp()
    for name in ("a", "b"):
        st.attach(model, st.LoRA(r=2), name=name)
    st.save(model, tmp_path / "x")
    assert st.load(mlp(), tmp_path / "x").name == "b"  # the one in use
    st.use(model, None)
    with pytest.raises(NoSuchAdapter, match="which adapter"):
        st.save(model, tmp_path / "x")
    with pytest.raises(NoSuchAdapter, match="'c'"):
        st.save(model, tmp_path / "x", name="c")


def test_saved_while_merged_is_the_same(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, SPECS["lora and a head"])
    shaken(model)
    st.save(model, tmp_path / "a", name="default")
    st.merge(model, "default")
    st.save(model, tmp_path / "b", name="default")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(MergeError):
        st.load(model, tmp_path / "a", name="other")


def test_who_acts_and_who_trains_after_loading(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2), name="a")
    shaken(model, "a")
    st.save(model, tmp_path)
    x = torch.ones(1, 8)

    fresh = mlp()
    bare = fresh(x)
    assert st.load(fresh, tmp_path).trainable == 0
    assert torch.equal(fresh(x), model(x))  # the first one acts at once
    assert not any(p.requires_grad for p in fresh.parameters())
    st.load(fresh, tmp_path, name="b")
    assert fresh.slim_state.current().names == {"a"}  # later ones wait
    with pytest.raises(NameInUse):
        st.load(fresh, tmp_path)
    report = st.load(fresh, tmp_path, name="c", trainable=True)
    assert report.trainable == report.rows[0].total * 2
    assert fresh.slim_state.current().names == {"c"}
    assert {".c." in n for n, p in fresh.named_parameters() if p.requires_grad} == {True}
    fresh(x).sum().backward()
    for name in "abc":
        st.detach(fresh, name)
    assert torch.equal(fresh(x), bare)


def test_dtype_of_the_loaded_parameters(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    for base_dtype, asked, want in [
        (torch.float32, None, torch.float32), (torch.bfloat16, None, torch.float32), (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16, torch.float16),
    ]:  # fmt: skip
        m = mlp().to(base_dtype)
        st.load(m, tmp_path, dtype=asked)
        assert {p.dtype for p in m.slim_state.adapters["default"].parameters()} == {want}


def test_a_base_without_weights_is_refused(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(MismatchError, match="meta"):
        st.load(empty, tmp_path)


def test_relaxations_are_explicit_and_noted(tmp_path: Path) -> None:
    model = mlp()
    st.attach(model, st.LoRA(r=2))
    shaken(model)
    st.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "me/elsewhere"}))
    assert st.load(mlp(), tmp_path).notes == []  # that says nothing about what the adapter does
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))
    with pytest.raises(FileError, match="do not belong together") as caught:
        st.load(mlp(), tmp_path)
    assert "relax='config'" in caught.value.hint
    assert "changed after saving" in st.load(mlp(), tmp_path, relax="config").notes[0]
    path.unlink()
    assert "missing" in st.load(m := mlp(), tmp_path).notes[0]
    assert torch.equal(m(torch.ones(1, 8)), model(torch.ones(1, 8)))

    weights = tmp_path / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(FileError, match="checksum"):
        st.load(mlp(), tmp_path)
    assert st.load(mlp(), tmp_path, relax=("checksum", "config")).notes
    with pytest.raises(ValueError, match="relax="):
        st.load(mlp(), tmp_path, relax="everything")


def test_the_hundredth_adapter_costs_as_much_as_the_first(tmp_path: Path) -> None:
    model = llama(layers=6)
    st.attach(model, st.LoRA(r=2))
    st.save(model, tmp_path)
    fresh, calls = llama(layers=6), []
    for i in range(100):
        profile = cProfile.Profile()
        profile.runcall(st.load, fresh, tmp_path, name=f"a{i}")
        calls.append(sum(entry.callcount for entry in profile.getstats()))  # work is counted: seconds are the machine's affair
    assert calls[99] < 1.1 * calls[5], (calls[5], calls[99])


def test_patterns_in_both_languages() -> None:
    paths = ["q", "a.q", "a.fc_q", "layers.0.x.q", "layers.1.x.q", "layers.1.x.v", "m.layers.0.q", "m.layers.1.q", "m.layers.1.v"]
    for wanted in ({"a.q"}, {"q"}, {"m.layers.1.q"}, {"m.layers.1.q", "m.layers.1.v"}, set(paths), {"q", "a.q"}, {"a.fc_q", "layers.1.x.v"}):
        config = to_targets(wanted, paths)
        named = named_by(config["target_modules"], paths)
        if "layers_to_transform" in config:
            named = {p for p in named if any(f"layers.{i}." in p and p.startswith("m.") for i in config["layers_to_transform"])}
        assert named == wanted
    assert from_suffix("q_proj") == "q_proj"
    assert from_suffix("q") == r"re:(.*\.)?q"  # a role here, a plain name there
    assert from_key("^a.b") == r"re:(.*\.)?(^a.b)"
    assert to_pattern({"a.q": 2, "b.q": 2, "a.v": 8, "b.v": 4}, 8) == {"q": 2, r"^b\.v": 4}


def test_the_task_by_the_class() -> None:
    assert task_type(llama(1)) == "CAUSAL_LM"
    assert task_type(mlp()) is None


# ---- merged checkpoints -------------------------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, and the most that lived at one time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = known  # where tensors lie that were there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and func._schema.is_mutable is False and not t._is_view():
                self.track(t.untyped_storage())
        return result

    def track(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("shard_bytes", [10**9, 6000])
def test_merged_to_disk_without_holding_the_model_twice(shard_bytes: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(layers=8)
    st.attach(model, st.LoRA(r=4))
    shaken(model)
    want = out(model)
    before = {n: hashlib.sha256(p.detach().numpy().tobytes()).digest() for n, p in model.named_parameters()}
    gc.collect()
    with Live({p.data_ptr() for p in model.parameters()}) as live:
        merge_to_disk(model, model.slim_state.current().segments[0][1], tmp_path / "m", shard_bytes=shard_bytes)
    whole = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".slim." not in n)
    largest = max(p.numel() * p.element_size() for n, p in model.named_parameters() if ".slim." not in n)
    assert 0 < live.most < 8 * largest < whole / 4
    assert {n: hashlib.sha256(p.detach().numpy().tobytes()).digest() for n, p in model.named_parameters()} == before
    assert torch.equal(out(model), want)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (out(plain) - want).abs().max() < 1e-5
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 6000)
    assert not any("adapter" in f for f in files)
    merge_to_disk(model, model.slim_state.current().segments[0][1], tmp_path / "m")  # over the old one, also with fewer shards
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("which", ["body", "head", "embedding"])
def test_tied_weights_on_disk(which: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=True)
    st.attach(model, st.LoRA(r=4, targets={"body": "all-linear", "head": "lm_head", "embedding": "embed_tokens"}[which]))
    shaken(model)
    st.merge(model, "default", out=tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (out(plain) - out(model)).abs().max() < 1e-5
    assert plain.config.tie_word_embeddings == (which == "body")


def test_a_stack_and_a_sum_on_disk(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama()
    for name in ("a", "b"):
        st.attach(model, st.LoRA(r=4), name=name)
        shaken(model, name, ord(name))
    for i, plan in enumerate((["a", "b"], {"a": 0.5, "b": -0.25})):
        st.use(model, plan)
        st.merge(model, out=tmp_path / str(i))
        assert (out(AutoModelForCausalLM.from_pretrained(tmp_path / str(i))) - out(model)).abs().max() < 1e-5


def test_modules_of_other_kinds_on_disk(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.conv, self.mha, self.norm = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2), nn.LayerNorm(8)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.norm(self.emb(ids))
            h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
            return h + self.mha(h, h, h)[0]

    def net() -> nn.Module:
        torch.manual_seed(0)
        return Net().eval()

    ids = torch.arange(8).reshape(2, 4)
    model = net()
    st.attach(model, st.LoRA(r=2, targets=("emb", "conv", "mha"), up_bias=False, train_modules=("norm",)))
    shaken(model)
    st.merge(model, "default", out=tmp_path / "m")
    plain = net()
    plain.load_state_dict(load_file(tmp_path / "m/model.safetensors"))
    assert (plain(ids) - model(ids)).abs().max() < 1e-5
    assert (plain(ids) - net()(ids)).abs().max() > 1e-2


def test_a_checkpoint_with_no_place_for_a_bias(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, st.BitFit(missing="add"))
    shaken(model)
    with pytest.raises(MergeError, match="no place"):
        st.merge(model, "default", out=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2))
    (tmp_path / "diary.txt").write_text("x")
    with pytest.raises(MergeError, match=r"diary\.txt"):
        st.merge(model, "default", out=tmp_path)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_base_on_disk_is_a_plain_one(how: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = quantised(llama().bfloat16(), how)
    st.attach(model, st.LoRA(r=4))
    shaken(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    st.merge(model, "default", out=tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    kind = model.model.layers[0].self_attn.q_proj.slim.kind
    op = model.slim_state.adapters["default"].ops["model.layers.0.self_attn.q_proj", "weight"]
    want = op.weight(kind.read(model.model.layers[0].self_attn.q_proj, "weight")).bfloat16()
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, want)
    assert (out(plain).float() - out(model).float()).abs().max() < 0.05 * out(model).abs().max()


def quantised(model: nn.Module, how: str) -> nn.Module:
    """Exchange the linear layers of a model for those of bitsandbytes."""
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            size = (module.in_features, module.out_features)
            options = {"quant_type": "nf4"} if how == "nf4" else {"has_fp16_weights": False}
            new = (bnb.nn.Linear4bit if how == "nf4" else bnb.nn.Linear8bitLt)(*size, bias=False, **options)
            new.load_state_dict(module.state_dict())
            model.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], new.to("cpu"))
    return model
