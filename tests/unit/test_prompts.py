"""The methods with virtual tokens: how they start, their networks and tasks, and what their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slimtune as st
from slimtune.core.carried import base_state_dict
from slimtune.core.errors import PlanError, SpecError
from slimtune.testing import zoo
from slimtune.testing.cases import rescale
from slimtune.testing.subject import fill

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]])


def llama() -> Any:
    torch.manual_seed(1)
    return rescale(zoo.llama()).double().eval()


def op_of(model: Any, name: str = "default") -> Any:
    return next(op for op in model.slim_state.adapters[name].ops.values() if op.port == "stream")


def by_hand(model: Any, ids: Tensor, prompts: Tensor) -> Tensor:
    """Logits of the bare base behind virtual tokens [m, p, d]."""
    with st.disabled(model), torch.no_grad():
        x = torch.cat([prompts, model.get_input_embeddings()(ids)], 1)
        return model(inputs_embeds=x).logits[:, prompts.shape[1] :]


# ---- starts -----------------------------------------------------------------------------------------------------------
def test_virtual_tokens_can_start_spread_like_token_embeddings() -> None:
    model = llama()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.mul_(3).add_(torch.linspace(-4, 4, table.shape[1]))
    st.attach(model, st.PromptTuning(tokens=400, init="like_tokens"))
    prompt = op_of(model).prompt
    assert torch.allclose(prompt.mean(0), table.mean(0), atol=0.25)
    assert torch.allclose(prompt.std(0), table.std(0), rtol=0.35)
    assert torch.equal(prompt, op_of(_attached(llama_like(model), st.PromptTuning(tokens=400, init="like_tokens"))).prompt), "one seed, one start"
    assert not torch.equal(prompt, op_of(_attached(llama_like(model), st.PromptTuning(tokens=400, init="like_tokens", seed=1))).prompt)


def llama_like(model: Any) -> Any:
    twin = llama()
    twin.load_state_dict(base_state_dict(model))
    return twin


def _attached(model: Any, spec: st.Spec) -> Any:
    st.attach(model, spec)
    return model


def test_starts_from_the_vocabulary_and_from_text(tmp_path: Path) -> None:
    table = llama().get_input_embeddings().weight
    rows = op_of(_attached(llama(), st.PromptTuning(tokens=6, init="vocab"))).prompt
    assert all(any(torch.equal(r, t) for t in table) for r in rows)
    assert not torch.equal(rows[0], rows[1])
    rows = op_of(_attached(llama(), st.PromptTuning(tokens=200))).prompt
    assert 0.95 < float(rows.std()) < 1.05
    rows = op_of(_attached(llama(), st.PromptTuning(tokens=200, init="like_tokens"))).prompt
    assert float(rows.std()) == pytest.approx(float(table.std()), rel=0.1)
    for cls in (st.PromptTuning, st.MultitaskPromptTuning):
        rows = op_of(_attached(llama(), cls(tokens=5, init="text", init_text=(4, 9)))).prompt
        assert torch.equal(rows, table[[4, 9, 4, 9, 4]])
    folder = _tokenizer(tmp_path)
    rows = op_of(_attached(llama(), st.PromptTuning(tokens=2, init="text", init_text="b a c", tokenizer=folder))).prompt
    assert torch.equal(rows, table[[6, 5]])


def _tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 5, "b": 6, "c": 7, "[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def test_starts_that_are_impossible(tmp_path: Path) -> None:
    bad = [
        (st.PromptTuning(tokens=0, init="texts", width=0, layers="0"), "tokens must be .*layers= .*width must .*init must"),
        (st.PromptTuning(init="text"), "needs init_text"),
        (st.PromptTuning(init="text", init_text="hello"), "needs tokenizer"),
        (st.PromptTuning(init_text="hello"), "belong to init"),
        (st.PromptTuning(init="text", init_text=(3, 5000)), "token 5000, and the model has"),
        (st.PromptTuning(init="text", init_text="x", tokenizer=str(tmp_path / "none")), "tokenizer cannot be read"),
        (st.PTuning(encoder="gru", hidden=0, encoder_layers=0, dropout=1.0), "encoder must .*hidden must .*encoder_layers must .*dropout must"),
        (st.PTuning(dropout=0.1), "between the layers of an LSTM"),
        (st.MultitaskPromptTuning(tasks=0, r=0), "tasks must .*r must"),
    ]
    for spec, message in bad:
        model = llama()
        with pytest.raises(SpecError, match=message) as caught:
            st.attach(model, spec)
        assert caught.value.where
        assert caught.value.hint
        assert "slim_state" not in model.__dict__
    with pytest.raises(SpecError, match="needs token embeddings"):
        st.attach(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), st.PromptTuning(targets="0", width=4, init="vocab"))


# ---- P-tuning ---------------------------------------------------------------------------------------------------------
def test_the_networks_are_those_of_the_formula() -> None:
    model = _attached(llama(), st.PTuning(tokens=4, hidden=6))
    fill(model, "default")
    op = op_of(model)
    W1, b1, W2, b2, W3, b3 = op.network.parameters()
    made = torch.relu(torch.relu(op.z @ W1.T + b1) @ W2.T + b2) @ W3.T + b3
    assert torch.allclose(op.prompt, made)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, by_hand(model, IDS, made.detach().expand(3, -1, -1)), atol=1e-6)
    model = _attached(llama(), st.PTuning(tokens=4, hidden=6, encoder="lstm", encoder_layers=3))
    fill(model, "default")
    op = op_of(model)
    lstm = nn.LSTM(32, 6, num_layers=3, bidirectional=True).double()
    with torch.no_grad():
        for p, q in zip(lstm.parameters(), op.network.lstm, strict=True):
            p.copy_(q)
    V1, c1, V2, c2 = op.network.head.parameters()
    assert torch.allclose(op.prompt, torch.relu(lstm(op.z)[0] @ V1.T + c1) @ V2.T + c2)


def test_a_file_of_p_tuning_holds_the_virtual_tokens_alone(tmp_path: Path) -> None:
    model = _attached(llama(), st.PTuning(tokens=4, hidden=6, encoder="lstm", dropout=0.5))
    fill(model, "default")
    want = model(IDS).logits
    model.train()  # the file must not depend on what dropout draws
    st.save(model, tmp_path)
    assert {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {"prompt_embeddings": (4, 32)}
    other = llama()
    st.load(other, tmp_path, trainable=True)
    assert torch.allclose(other(IDS).logits, want)
    assert [tuple(p.shape) for p in other.parameters() if p.requires_grad] == [(4, 32)]
    other(input_ids=IDS, labels=IDS).loss.backward()
    assert op_of(other).z.grad.abs().max() > 0


# ---- tasks ------------------------------------------------------------------------------------------------------------
def tasked(r: int = 2) -> Any:
    model = llama()
    for name in ("a", "b"):
        st.attach(model, st.MultitaskPromptTuning(tokens=3, tasks=4, r=r), name=name)
        fill(model, name, 0.3)
    st.use(model, "a")
    return model


def made(model: Any, name: str, task: int) -> Tensor:
    op = op_of(model, name)
    return (op.prompt * (op.u[task] @ op.v[task])).detach()


def test_every_row_has_the_prompt_of_its_task() -> None:
    model = tasked()
    with torch.no_grad(), st.tasks(model, [2, 0, 2]):
        out = model(IDS).logits
    assert torch.allclose(out, by_hand(model, IDS, torch.stack([made(model, "a", k) for k in (2, 0, 2)])), atol=1e-6)
    with torch.no_grad(), st.tasks(model, torch.tensor([3, 1, 0])), st.use(model, rows=["b", None, "a"]):
        mixed = model(IDS).logits
    for i, (name, k) in enumerate((("b", 3), (None, 0), ("a", 0))):
        prompt = torch.zeros(0, 32).double() if name is None else made(model, name, k)
        assert torch.allclose(mixed[i], by_hand(model, IDS[i : i + 1], prompt[None])[0], atol=1e-6)


def test_tasks_train_their_own_factors_and_one_prompt() -> None:
    model = tasked()
    op = op_of(model, "a")
    with st.tasks(model, [1, 3, 1]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert [bool(g.abs().max() > 0) for g in op.u.grad] == [False, True, False, True]
    assert [bool(g.abs().max() > 0) for g in op.v.grad] == [False, True, False, True]
    assert op.prompt.grad.abs().max() > 0


def test_at_the_start_every_task_has_the_shared_prompt() -> None:
    model = _attached(llama(), st.MultitaskPromptTuning(tokens=3, tasks=4, r=3))
    op = op_of(model)
    for k in range(4):
        assert torch.allclose(op.rows(None, torch.tensor([k]))[0], op.prompt)
    with st.tasks(model, [0, 1, 2]):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert op.v.grad[0].abs().min(1).values.gt(0).all(), "every rank of a task trains"


def test_tasks_while_generating() -> None:
    model = tasked()
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with st.tasks(model, [2, 0, 1]):
        out = model.generate(IDS, num_beams=2, **options)
    for i, k in enumerate((2, 0, 1)):
        with st.tasks(model, k):
            assert torch.equal(model.generate(IDS[i : i + 1], num_beams=2, **options)[0], out[i][: len(out[i])])


def test_tasks_are_said_for_a_block_or_from_now_on() -> None:
    model = tasked()
    with pytest.raises(PlanError, match="nobody has said") as caught:
        model(IDS)
    assert "st.tasks" in caught.value.hint
    st.tasks(model, 1)
    one = model(IDS).logits
    with st.tasks(model, [0, 0, 0]):
        zero = model(IDS).logits
        with st.tasks(model, 1):
            assert torch.equal(model(IDS).logits, one)
        assert torch.equal(model(IDS).logits, zero)
    assert torch.equal(model(IDS).logits, one)
    assert not torch.equal(zero, one)
    for ids, message in (([0, 1], "2 task numbers"), ([0, 9, 1], "no task 9"), (4, "no task 4")):
        with pytest.raises(PlanError, match=message), st.tasks(model, ids):
            model(IDS)
    for wrong in ([0.5], [-1], "abc", [[1]], [True]):
        with pytest.raises(PlanError, match="whole numbers"):
            st.tasks(model, wrong)  # type: ignore[arg-type]
    assert torch.equal(model(IDS).logits, one), "what could not be read changed nothing"


@pytest.mark.slow
def test_tasks_in_a_compiled_model() -> None:
    model = tasked()
    fast: Any = torch.compile(model, fullgraph=True, backend="eager")
    for ids in ([2, 0, 1], [1, 1, 3]):
        with torch.no_grad(), st.tasks(model, ids):
            assert torch.allclose(fast(IDS).logits, model(IDS).logits)


# ---- first places and decoders ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_which_place_a_head_reads(name: str) -> None:
    """A pooler inside the body reads the first virtual token; a head outside of it the first real one, unless the tokens are kept."""
    for keep in (False, True):
        torch.manual_seed(1)
        model: Any = rescale(getattr(zoo, name)()).double().eval()
        st.attach(model, st.PromptTuning(tokens=3, keep=keep, train_modules=()))
        fill(model, "default")
        prompt = op_of(model).prompt.detach()
        with torch.no_grad():
            out = model(IDS).logits
            with st.disabled(model):
                x = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], 1)
                first = model(inputs_embeds=x).logits
                hidden = model.base_model(inputs_embeds=x).last_hidden_state
        if name == "bert" or keep:
            assert torch.allclose(out, first)
        else:
            assert not torch.allclose(out, first, atol=1e-3)
            real = hidden[:, 3:]
            with torch.no_grad():
                want = model.classifier(real) if name == "roberta" else model.classifier(torch.relu(model.pre_classifier(real[:, 0])))
            assert torch.allclose(out, want)


def test_kept_and_stripped_prompts_do_not_mix() -> None:
    model: Any = zoo.roberta()
    st.attach(model, st.PromptTuning(tokens=3, keep=True), name="kept")
    st.attach(model, st.PromptTuning(tokens=3), name="stripped")
    with pytest.raises(PlanError, match="stay in the body's output"), st.use(model, rows=["kept", "stripped", None]):
        model(IDS)
    with torch.no_grad(), st.use(model, rows=["kept", None, "kept"]):
        mixed = model(IDS).logits
    with torch.no_grad(), st.use(model, None):
        assert torch.allclose(mixed[1], model(IDS).logits[1], atol=1e-6)


def test_prompts_in_front_of_both_stacks() -> None:
    torch.manual_seed(1)
    model: Any = rescale(zoo.t5()).double().eval()
    st.attach(model, st.PromptTuning(tokens=3, decoder=True))
    fill(model, "default")
    ahead, behind = (op.prompt.detach() for op in model.slim_state.adapters["default"].ops.values() if op.port == "stream")
    decoder = IDS[:, :2]
    out = model(IDS, decoder_input_ids=decoder).logits
    table = model.get_input_embeddings()
    with st.disabled(model), torch.no_grad():
        x, y = (torch.cat([p.expand(3, -1, -1), table(ids)], 1) for p, ids in ((ahead, IDS), (behind, decoder)))
        want = model(inputs_embeds=x, decoder_inputs_embeds=y).logits[:, 3:]
    assert torch.allclose(out, want)
    made = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    logits = [model(IDS[:1], decoder_input_ids=made[:1, :i]).logits[0, -1].index_fill(0, torch.tensor(1), -torch.inf) for i in (1, 2, 3)]
    assert made[0, 1:].tolist() == [int(row.argmax()) for row in logits]
    with pytest.raises(st.SlimtuneError, match="finds no decoder"):
        st.attach(llama(), st.PromptTuning(decoder=True))
