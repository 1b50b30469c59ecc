"""extract: a fully fine-tuned model minus its base, from files read tensor by tensor or from a model in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from algebra_net import IDS, Net, net
from torch import Tensor, nn

import slimtune as st
from slimtune.algebra.checkpoint import Checkpoint
from slimtune.core.errors import FileError, FormatError, MismatchError, NameInUse, SpecError
from slimtune.files.container import write_tensors


def tuned_from(base: nn.Module, *, rank: int | None = None, only: str = "") -> nn.Module:
    """Return a copy with other weights: changes of a rank where they are matrices."""
    made = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith(only):
                if rank is not None and p.dim() == 2:
                    A, B = (torch.randn(s, generator=draw, dtype=p.dtype) for s in ((rank, p.shape[1]), (p.shape[0], rank)))
                    p += 0.1 * B @ A
                else:
                    p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return made


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


def write(model: nn.Module, folder: Path, shards: int = 1, index: bool = True) -> Path:
    folder.mkdir()
    tensors = {k: v.detach() for k, v in model.state_dict().items()}
    names = list(tensors)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    table = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_tensors(folder / file, {k: tensors[k] for k in names[i::shards]}, {"format": "pt"})
        table |= dict.fromkeys(names[i::shards], file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


EVERY = st.LoRA(r=12, targets=("q", "k", "o", "conv", "emb"))


@pytest.mark.parametrize("source", ["model", "one file", "shards", "shards without an index", "the file itself"])
def test_everything_that_changed_is_there(source: str, tmp_path: Path) -> None:
    base = net()
    tuned = tuned_from(base)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    if source == "model":
        where: nn.Module | Path = tuned
    else:
        where = write(tuned, tmp_path / "tuned", 3 if "shards" in source else 1, "without" not in source)
        where = where / "model.safetensors" if source == "the file itself" else where
    report = st.extract(base, where, to=EVERY, name="x")
    assert set(report.ranks()) == {"q", "k", "o", "conv", "emb"}
    assert report.worst < 1e-12
    torch.testing.assert_close(run(base), run(tuned), rtol=1e-9, atol=1e-9)  # the first adapter is in use at once
    st.save(base, tmp_path / "x", name="x")
    other = net()
    st.load(other, tmp_path / "x", dtype=torch.float64)
    torch.testing.assert_close(run(other), run(tuned), rtol=1e-9, atol=1e-9)
    st.detach(base, "x")
    assert type(base) is Net
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_the_best_of_its_rank_with_its_error(tmp_path: Path) -> None:
    base = net()
    tuned = tuned_from(base)
    report = st.extract(base, write(tuned, tmp_path / "tuned"), to=st.LoRA(r=2, targets=("q", "k")), rest="leave", name="x")
    for path in ("q", "k"):
        dense = (tuned.get_submodule(path).weight - base.get_submodule(path).weight).detach()
        U, S, V = torch.linalg.svd(dense)
        op = next(op for (p, _), op in base.slim_state.adapters["x"].ops.items() if p == path and op.method == "lora")  # type: ignore[union-attr, operator, index]
        torch.testing.assert_close(op.delta(), (U[:, :2] * S[:2]) @ V[:2])
        torch.testing.assert_close(report.errors[path], float((S[2:].square().sum() / S.square().sum()).sqrt()))
    assert any("left out" in n and "norm" in n for n in report.notes)
    paths = {p for p, _ in base.slim_state.adapters["x"].ops}  # type: ignore[union-attr, operator, index]
    assert paths == {"q", "k"}


def test_the_rank_of_the_change_is_found() -> None:
    base = net()
    report = st.extract(base, tuned_from(base, rank=3), to=EVERY, energy=1 - 1e-12, name="x")
    assert {report.ranks()[p] for p in ("q", "k", "o", "emb")} == {3}


def test_what_did_not_change_gets_nothing() -> None:
    base = net()
    report = st.extract(base, tuned_from(base, only="q.weight"), to=EVERY, name="x")
    assert [(r.path, r.param) for r in report.rows] == [("q", "weight")]
    other = net()
    from slimtune.core.errors import CapabilityError

    with pytest.raises(CapabilityError, match="hold nothing"):
        st.extract(other, net(), to=EVERY, name="x")
    assert type(other) is Net


def test_a_real_architecture_with_tied_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31, tie_word_embeddings=True
    )
    base = LlamaForCausalLM(config).eval()
    tuned = tuned_from(base)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="4KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").exists()
    report = st.extract(base, tmp_path / "tuned", to=st.LoRA(r=16), name="x")
    assert len(report.ranks()) == 14
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)
    body = LlamaForCausalLM(config).model  # names without the prefix of the whole model
    body.load_state_dict(base.model.state_dict(), strict=False)
    report = st.extract(body, tmp_path / "tuned", to=st.LoRA(r=16), name="y")
    with torch.no_grad():
        torch.testing.assert_close(body(ids)[0], tuned.model(ids)[0], rtol=1e-4, atol=1e-5)


def test_experts_and_transposed_weights(tmp_path: Path) -> None:
    from slimtune.testing.cases import case

    for name in ("experts", "experts, transposed", "HF Conv1D", "MultiheadAttention packed", "MultiheadAttention separate"):
        that = case(name)
        base = that.build()
        tuned = tuned_from(base, only="body.in_proj" if "Multi" in name else "body")
        with torch.no_grad():
            for n, p in tuned.named_parameters():
                if "experts" in name and n.endswith("bias"):
                    p.copy_(base.get_parameter(n))  # biases of experts are not adapted
        report = st.extract(base, write(tuned, tmp_path / name.replace(" ", "")), to=st.LoRA(r=64, targets=("body",)), name="x")
        assert report.worst < 1e-7, name
        torch.testing.assert_close(base(*that.inputs()), tuned(*that.inputs()), rtol=1e-8, atol=1e-8)


def test_only_one_weight_of_the_other_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    base = nn.ModuleDict({f"l{i}": nn.Linear(64, 64, bias=False) for i in range(12)})
    folder = write(tuned_from(base), tmp_path / "tuned", 3)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    tensor = Checkpoint.tensor

    def counted(self: Checkpoint, name: str) -> Tensor | None:
        nonlocal most
        found = tensor(self, name)
        assert found is not None
        alive.append(weakref.ref(found))
        most = max(most, sum(r() is not None for r in alive))
        return found

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    st.extract(base, folder, to=st.LoRA(r=4, targets=("l*",)), name="x")
    assert len(alive) >= 12
    assert most <= 3


def test_quantised_base_learns_its_rounding_too(tmp_path: Path) -> None:
    from slimtune.testing.cases import case

    that = case("nf4")
    base = that.build()
    plain = nn.ModuleDict({"body": nn.Linear(64, 32)})
    with torch.no_grad():
        plain["body"].weight.normal_(std=0.2)
        plain["body"].bias.copy_(base.body.bias)  # type: ignore[union-attr, arg-type]
    report = st.extract(base, write(plain, tmp_path / "tuned"), to=st.LoRA(r=32, targets=("body",)), name="x")
    assert report.worst < 1e-5
    inputs = that.inputs()
    torch.testing.assert_close(base(*inputs), plain["body"](*inputs), rtol=1e-3, atol=1e-4)


# ---- what is refused --------------------------------------------------------------------------------------------------
def test_models_that_do_not_belong_together(tmp_path: Path) -> None:
    base = net()
    tensors = {k: v.detach() for k, v in tuned_from(base).state_dict().items()}

    def refuse(changed: dict[str, Tensor], word: str) -> MismatchError:
        folder = tmp_path / word
        folder.mkdir()
        write_tensors(folder / "model.safetensors", changed, {})
        with pytest.raises(MismatchError) as caught:
            st.extract(base, folder, to=EVERY, name="x")
        assert word in str(caught.value)
        assert caught.value.hint
        assert type(base) is Net
        return caught.value

    refuse({k: v for k, v in tensors.items() if k != "q.weight"}, "q.weight")
    refuse({**tensors, "score.weight": torch.zeros(2, 2)}, "score.weight")
    refuse({**tensors, "emb.weight": torch.zeros(12, 8, dtype=torch.float64)}, "[12, 8]")
    report = st.extract(base, tmp_path / "q.weight", to=EVERY, name="x", relax="missing")
    assert not any(op.method == "lora" for (p, _), op in base.slim_state.adapters["x"].ops.items() if p == "q")  # type: ignore[union-attr, operator, index]
    assert report.worst < 1e-12
    st.extract(base, tmp_path / "score.weight", to=EVERY, name="y", relax=("unexpected",))
    with pytest.raises(NameInUse):
        st.extract(base, tmp_path / "score.weight", to=EVERY, name="y", relax=("unexpected",))


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    base = net()

    def refuse(folder: Path, error: type[Exception], word: str) -> None:
        with pytest.raises(error) as caught:
            st.extract(base, folder, to=EVERY, name="x")
        assert word in str(caught.value)

    refuse(tmp_path / "nowhere", FileError, "no folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, FileError, "no safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"PK")
    refuse(empty, FileError, "only pytorch_model.bin")
    (empty / "model.safetensors").write_bytes(b"not a safetensors file")
    refuse(empty, FormatError, "not a valid")
    whole = write(tuned_from(base), tmp_path / "whole", 2)
    (whole / "model-00002-of-00002.safetensors").unlink()
    refuse(whole, FileError, "missing")
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"q.weight": "../elsewhere.safetensors"}}')
    refuse(whole, FormatError, "weight_map")
    st.attach(base, st.LoRA(r=2, targets=("q",)), name="a")
    st.save(base, tmp_path / "a", name="a")
    refuse(tmp_path / "a", FormatError, "an adapter")


def test_options_that_make_no_sense() -> None:
    base = net()
    for options, word in (
        ({"to": st.IA3()}, "not ia3"),
        ({"to": st.LoRA(r=0)}, "at least 1"),
        ({"to": st.LoRA(up_bias=True)}, "up_bias"),
        ({"to": st.LoRA(train_modules=("o",))}, "train_modules"),
        ({"rest": "drop"}, "dense or leave"),
        ({"relax": "shape"}, "missing"),
        ({"energy": 2}, "share"),
    ):
        with pytest.raises(SpecError) as caught:
            st.extract(base, net(), name="x", **options)  # type: ignore[arg-type]
        assert word in str(caught.value)


def test_rounding_is_told() -> None:
    base = Net().float()
    report = st.extract(base, copy.deepcopy(base).bfloat16(), to=st.LoRA(r=1, targets=("q",)), name="x")
    assert any("rounding" in note for note in report.notes)
