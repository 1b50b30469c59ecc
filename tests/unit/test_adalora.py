"""AdaLoRA: scores, schedule, any loop, and what copies and files keep (the reference's decisions: tests/parity/test_adalora_files.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import slimtune as st
from slimtune.core.errors import SpecError
from slimtune.core.state import state_of

IDS = torch.arange(24).reshape(4, 6) % 13
TOTAL, T_INIT, T_FINAL, EVERY = 24, 3, 6, 2


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=13, max_position_embeddings=16, num_hidden_layers=2,
        intermediate_size=24,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


SPEC = st.AdaLoRA(
    init_r=6, target_r=3, alpha=8, t_init=T_INIT, t_final=T_FINAL, delta_t=EVERY, total_steps=TOTAL, targets=("q_proj", "v_proj", "down_proj")
)


def ops(model: nn.Module, name: str = "default") -> dict[str, Any]:
    return {path: op for (path, _), op in state_of(model).adapters[name].ops.items()}


def count(model: nn.Module) -> int:
    return sum(op.rank_now() for op in ops(model).values())


def train(model: Any, steps: int, lr: float = 2e-2, optimiser: Any = None) -> Any:
    optimiser = optimiser or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return optimiser


def test_importance_is_that_of_the_paper() -> None:
    model = llama()
    st.attach(model, st.AdaLoRA(init_r=4, target_r=2, total_steps=50, orthogonality=0.0, beta1=0.7, beta2=0.6, targets=("q_proj",)))
    o = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    op = ops(model)["model.layers.0.self_attn.q_proj"]
    S = {n: torch.zeros_like(p) for n, p in op.named_parameters()}
    U = {n: torch.zeros_like(p) for n, p in op.named_parameters()}
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        o.step()
        for n, p in op.named_parameters():
            now = (p * p.grad).abs()
            S[n] = 0.7 * S[n] + 0.3 * now
            U[n] = 0.6 * U[n] + 0.4 * (now - S[n]).abs()
        o.zero_grad()
    s = {n: S[n] * U[n] for n in S}
    for i in range(4):
        want = s["E"][i, 0] + s["A"][i].mean() + s["B"][:, i].mean()
        torch.testing.assert_close(op.scores()[i], want)


def test_ties_do_not_cut_below_the_budget() -> None:
    model = llama()
    st.attach(model, st.AdaLoRA(init_r=4, target_r=2, total_steps=6, t_init=0, t_final=2, delta_t=1, orthogonality=0.0, targets=("q_proj",)))
    o = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)  # as in the first step of a warm-up: all scores are 0
    for t in range(1, 7):
        model(IDS, labels=IDS).loss.backward()
        o.step()
        spec = state_of(model).adapters["default"].spec
        assert sum(int(op.chosen.sum()) for op in ops(model).values()) == spec.budget(t, 6, 8, 4)


def test_a_plain_loop_must_say_how_long_it_is() -> None:
    model = llama()
    st.attach(model, st.AdaLoRA(targets=("q_proj",)))
    before = {k: v.clone() for k, v in ops(model)["model.layers.0.self_attn.q_proj"].state_dict().items()}
    with pytest.raises(SpecError, match="length of training") as caught:
        train(model, 1)
    assert "total_steps=" in caught.value.hint
    assert all(torch.equal(v, before[k]) for k, v in ops(model)["model.layers.0.self_attn.q_proj"].state_dict().items())
    st.detach(model, "default")
    st.attach(model, st.AdaLoRA(targets=("q_proj",), t_init=10, t_final=10, total_steps=21))
    with pytest.raises(SpecError, match="leave none of total_steps=20"):
        st.attach(model, st.AdaLoRA(t_init=10, t_final=10, total_steps=20), name="b")


@pytest.mark.parametrize("trl", [False, True])
def test_a_trainer_brings_the_budget_to_its_end(trl: bool, tmp_path: Any) -> None:
    import transformers

    model = llama().float()
    st.attach(model, st.AdaLoRA(init_r=6, target_r=2, delta_t=1, targets=("q_proj", "v_proj")))
    rows = [{"input_ids": IDS[i % 4].tolist(), "labels": IDS[i % 4].tolist()} for i in range(24)]
    options: dict[str, Any] = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
        "report_to": "none", "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    if trl:
        import datasets
        import tokens
        import trl as trl_lib
        from transformers import DataCollatorForSeq2Seq

        config = trl_lib.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False)
        tok = tokens.tokenizer()
        trainer = trl_lib.SFTTrainer(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok, data_collator=DataCollatorForSeq2Seq(tok)
        )
    else:
        trainer = transformers.Trainer(model=model, args=transformers.TrainingArguments(**options), train_dataset=rows)
    trainer.train()
    adapter = state_of(model).adapters["default"]
    assert (adapter.steps, adapter.total_steps) == (12, 12)
    assert count(model) == 4 * 2
    assert sum(st.report(model).ranks().values()) == 8
    assert "8 of 24 triplets act after optimiser step 12 of 12" in str(st.report(model))


def test_copies_go_on_as_the_original_does() -> None:
    model = llama()
    st.attach(model, SPEC)
    optimiser = train(model, 9)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=2e-2)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(model, TOTAL - 9, optimiser=optimiser)
    train(twin, TOTAL - 9, optimiser=other)
    for path, op in ops(model).items():
        for name, t in op.state_dict().items():
            assert torch.equal(t, ops(twin)[path].state_dict()[name]), f"{path}.{name}"


def test_files_hold_what_is_left_and_training_goes_on_from_them(tmp_path: Any) -> None:
    model = llama()
    st.attach(model, SPEC)
    train(model, 12)
    model.eval()
    st.save(model, tmp_path / "a")
    loaded = llama().eval()
    st.load(loaded, tmp_path / "a", trainable=True)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-12, atol=1e-12)
    st.save(loaded, tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    left = count(model)
    assert left < 36
    assert sum(op.E.numel() for op in ops(loaded).values()) == left
    assert state_of(loaded).adapters["default"].steps == 12
    train(loaded, TOTAL - 12)
    assert count(loaded) == 18
    st.save(loaded, tmp_path / "c")
    again = llama().eval()
    st.load(again, tmp_path / "c")
    torch.testing.assert_close(again(IDS).logits, loaded.eval()(IDS).logits, rtol=1e-12, atol=1e-12)


def test_a_site_without_any_rank_left(tmp_path: Any) -> None:
    model = llama()
    st.attach(model, SPEC)
    train(model, 4)
    path = "model.layers.0.mlp.down_proj"
    op = ops(model)[path]
    with torch.no_grad():
        op.chosen.zero_()
        op.prune()
    model.eval()
    want = model(IDS).logits
    st.save(model, tmp_path)
    loaded = llama().eval()
    st.load(loaded, tmp_path, trainable=True)
    assert ops(loaded)[path].E.shape == (0, 1)
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-12, atol=1e-12)
    train(loaded, 2)
    st.merge(loaded)


def test_it_learns_with_the_rank_where_it_is_needed() -> None:
    """Of two sites one has to learn a map of rank 4, the other nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(16))
    target = torch.eye(16, dtype=torch.float64) + torch.randn(16, 4, dtype=torch.float64) @ torch.randn(4, 16, dtype=torch.float64) / 8
    model[1].requires_grad_(False)
    st.attach(model, st.AdaLoRA(init_r=6, target_r=2, total_steps=300, t_init=0.2, t_final=0.4, delta_t=5, targets=("0",)))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(300):
        x = torch.randn(32, 16, dtype=torch.float64)
        loss = (model(x) - x @ target.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert count(model) == 2
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20]), losses[::30]
    E, A = ops(model)["0"].E, ops(model)["0"].A
    gram = A[E.flatten() != 0] @ A[E.flatten() != 0].T
    assert (gram - torch.eye(2)).abs().max() < 0.2, "the penalty keeps the directions orthonormal"


def test_experts_and_grouped_convolutions_keep_all_rows(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1)).double()
    x = torch.randn(2, 4, 5, 5).double()
    st.attach(model, st.AdaLoRA(init_r=4, target_r=2, total_steps=6, t_init=0, t_final=2, delta_t=1, targets=("0",)))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        model(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert count(model) == 2
    st.save(model, tmp_path)
    want = model(x).detach()
    torch.manual_seed(0)
    loaded = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1)).double()
    st.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), want)
    assert count(loaded) == 2
