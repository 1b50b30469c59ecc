"""Trained tokens: one set of rows for a table and its tied head, new tokens, files, and that no dense delta is ever made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.testing import check_method

VOCAB = 40


def llama(tied: bool = True, vocab: int = VOCAB) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=vocab, max_position_embeddings=16, num_hidden_layers=2,
        intermediate_size=24, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")))


def shake(model: nn.Module) -> None:
    torch.manual_seed(5)
    for p in dict.fromkeys(model.slim_state.adapters["default"].parameters()):
        nn.init.normal_(p)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


IDS = torch.tensor([[3, 9, 1, 3], [2, 2, 5, 9]])


def test_tied_rows_are_one_parameter_and_act_in_both_places() -> None:
    model, plain = llama().double(), llama().double()
    report = st.attach(model, st.TrainableTokens(tokens=(9, 3)))
    assert report.trainable == 2 * 16
    shake(model)
    (rows,) = {id(op.D): op.D for op in model.slim_state.adapters["default"].ops.values()}.values()
    with torch.no_grad():
        W = plain.model.embed_tokens.weight
        W[[3, 9]] += rows
    assert (logits(model, IDS) - logits(plain, IDS)).abs().max() < 1e-12

    out = logits(model, IDS).square().sum()
    (got,) = torch.autograd.grad(out, [rows])
    W.requires_grad_(True)
    (want,) = torch.autograd.grad(logits(plain, IDS).square().sum(), [W])
    assert (got - want[[3, 9]]).abs().max() < 1e-9 * want.abs().max()


def test_an_untied_head_stays_unless_it_is_asked_for() -> None:
    model = llama(tied=False)
    st.attach(model, st.TrainableTokens(tokens=(9, 3)))
    assert {path for path, _ in model.slim_state.adapters["default"].ops} == {"model.embed_tokens"}
    st.detach(model, "default")
    assert st.attach(model, st.TrainableTokens(tokens=(9, 3), head="train")).trainable == 2 * 2 * 16


def test_merging_writes_the_rows_and_unmerging_gives_back_the_bits() -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    st.attach(model, st.TrainableTokens(tokens=(3, 9)))
    shake(model)
    want = logits(model, IDS)
    st.merge(model)
    assert (logits(model, IDS) - want).abs().max() < 1e-5
    others = [i for i in range(VOCAB) if i not in (3, 9)]
    assert torch.equal(model.model.embed_tokens.weight[others], before["model.embed_tokens.weight"][others])
    assert torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)
    st.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in base_state_dict(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rows_of_a_batch_can_differ() -> None:
    model = llama()
    st.attach(model, st.TrainableTokens(tokens=(3, 9)), name="a")
    st.attach(model, st.Union(of=(st.LoRA(r=2), st.TrainableTokens(tokens=(3, 5)))), name="b")
    torch.manual_seed(5)
    for adapter in model.slim_state.adapters.values():
        for p in dict.fromkeys(adapter.parameters()):
            nn.init.normal_(p, std=0.3)
    ids = IDS[:1].expand(3, -1)
    with st.use(model, rows=["a", None, "b"]):
        mixed = logits(model, ids)
    for i, name in enumerate(["a", None, "b"]):
        with st.use(model, name):
            assert (logits(model, ids[:1])[0] - mixed[i]).abs().max() < 1e-5


def test_no_dense_delta_is_made() -> None:
    """In a table of 60 000 rows a training step makes nothing as large as the table, neither forward nor back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.data_ptr() != weight.data_ptr()
            )
            return out

    model = llama(vocab=60_000)
    st.attach(model, st.TrainableTokens(tokens=(3, 59_999)))
    shake(model)
    weight = model.model.embed_tokens.weight
    with Watch():
        logits(model, torch.tensor([[3, 59_999, 7]])).logsumexp(-1).sum().backward()
    n, d = 3, 16
    assert max(made) == n * 60_000  # the logits
    assert max(made) < 60_000 * d / 4
    grads = [op.D.grad for op in model.slim_state.adapters["default"].ops.values()]
    assert grads[0].shape == (2, d)
    assert grads[0].abs().sum() > 0


def test_new_tokens_from_the_tokenizer_to_the_file_and_back(tmp_path: Path) -> None:
    for tied in (True, False):
        model, tok = llama(tied), tokenizer()
        old = model.model.embed_tokens.weight.detach().clone()
        spec = st.add_tokens(model, tok, ["<call>", "</call>"])
        assert spec.tokens == (VOCAB, VOCAB + 1)
        assert tok.convert_tokens_to_ids("</call>") == VOCAB + 1
        assert model.config.vocab_size == VOCAB + 2
        assert torch.equal(model.model.embed_tokens.weight[:VOCAB], old)
        assert torch.allclose(model.model.embed_tokens.weight[VOCAB:], old.mean(0).expand(2, -1))
        assert torch.allclose(model.lm_head.weight[VOCAB:], model.lm_head.weight[:VOCAB].mean(0).expand(2, -1))
        st.attach(model, st.Union(of=(st.LoRA(r=2), spec)))
        shake(model)
        ids = torch.tensor([[3, VOCAB, 5, VOCAB + 1]])
        want = logits(model, ids)
        folder = tmp_path / str(tied)
        st.save(model, folder)

        fresh = llama(tied)
        with pytest.raises(st.SlimtuneError, match=r"2 token\(s\) beyond this vocabulary: 42 rows there, 40 here") as caught:
            st.load(fresh, folder)
        assert "model.resize_token_embeddings(42)" in str(caught.value.hint)
        assert "slim_state" not in fresh.__dict__
        fresh.resize_token_embeddings(42)  # its new rows are random, those of the file count
        st.load(fresh, folder)
        assert (logits(fresh, ids) - want).abs().max() < 1e-5


def test_merging_to_disk_writes_the_grown_model_and_keeps_it_tied(tmp_path: Path) -> None:
    model = llama()
    spec = st.add_tokens(model, tokenizer(), ["<call>"])
    st.attach(model, spec)
    shake(model)
    ids = torch.tensor([[3, VOCAB, 5]])
    want = logits(model, ids)
    st.merge(model, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == VOCAB + 1
    assert config["tie_word_embeddings"] is True
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert (logits(plain, ids) - want).abs().max() < 1e-5


def test_tied_weights_that_come_apart_are_written_apart(tmp_path: Path) -> None:
    model = llama()
    st.attach(model, st.Union(of=(st.TrainableTokens(tokens=(3,)), st.LoRA(r=2, targets="lm_head"))))
    shake(model)
    want = logits(model, IDS)
    st.merge(model, out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert (logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), IDS) - want).abs().max() < 1e-5


def test_scaled_tables_scale_the_rows() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=VOCAB, num_hidden_layers=1, intermediate_size=24,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    st.attach(model, st.TrainableTokens(tokens=(3, 9)))
    shake(model)
    want = logits(model, IDS)
    st.merge(model)
    assert (logits(model, IDS) - want).abs().max() < 1e-4 * want.abs().max()


def test_sums_with_a_lora_stay_exact() -> None:
    model = llama()
    st.attach(model, st.TrainableTokens(tokens=(3, 9)), name="a")
    st.attach(model, st.LoRA(r=2, targets="embed_tokens"), name="b")
    torch.manual_seed(5)
    for adapter in model.slim_state.adapters.values():
        for p in dict.fromkeys(adapter.parameters()):
            nn.init.normal_(p, std=0.3)
    with st.use(model, {"a": 0.5, "b": 2.0}):
        want = logits(model, IDS)
    st.combine(model, {"a": 0.5, "b": 2.0}, name="mix")
    with st.use(model, "mix"):
        assert (logits(model, IDS) - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (st.TrainableTokens(tokens=()), "names none"),
        (st.TrainableTokens(tokens=(1, 1)), "named twice"),
        (st.TrainableTokens(tokens=(-1,)), "whole numbers"),
        (st.TrainableTokens(tokens=("a",)), r"tuple\[int, ...\]"),  # type: ignore[arg-type]
        (st.TrainableTokens(tokens=(40,)), r"beyond the 40 rows.*resize_token_embeddings\(41\)"),
        (st.TrainableTokens(head="no"), "head must be"),
        (st.TrainableTokens(targets="norm"), "no tokens"),
    ],
)
def test_what_cannot_be_is_said(spec: st.Spec, words: str) -> None:
    model = llama()
    with pytest.raises(st.SlimtuneError, match=words):
        st.attach(model, spec)
    assert "slim_state" not in model.__dict__


def test_tokens_are_added_before_anything_is_attached() -> None:
    model = llama()
    st.attach(model, st.LoRA(r=2))
    tok = tokenizer()
    with pytest.raises(st.SlimtuneError, match="carries adapters"):
        st.add_tokens(model, tok, ["<a>"])
    for wrong in ("<a>", [], ["<a>", "<a>"], [""], [3]):
        with pytest.raises(st.SlimtuneError, match="list of different texts"):
            st.add_tokens(llama(), tok, wrong)  # type: ignore[arg-type]
    assert len(tok) == VOCAB
    with pytest.raises(st.SlimtuneError, match="no table of tokens"):
        st.add_tokens(nn.Linear(2, 2), tok, ["<a>"])


def test_a_plain_table_trains_like_a_dense_one() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(7, 4)).double()
    st.attach(table, st.TrainableTokens())
    shake(table)
    op = table.slim_state.adapters["default"].ops["0", "weight"]
    ids = torch.tensor([[0, 6, 3]])
    assert torch.allclose(table(ids), F.embedding(ids, table[0].weight + op.D))


@pytest.mark.slow
def test_conformance_with_two_tokens() -> None:
    check_method(st.TrainableTokens(tokens=(1, 3)))
