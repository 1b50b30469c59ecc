"""Mixed batches as others tried them elsewhere: one case for each kind of public report (see docs/faults.md)."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import slimtune as st

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}


def filled(net: nn.Module, **specs: st.Spec) -> nn.Module:
    """Attach adapters of random values."""
    for name, spec in specs.items():
        st.attach(net, spec, name=name)
        with torch.no_grad():
            for p in st.adapters(net)[name].parameters():
                p.copy_(torch.randn_like(p) * 0.2)
    return net.eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=None, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config).double()  # type: ignore[no-any-return]


def test_each_row_has_the_classifier_of_its_own_adapter() -> None:
    """peft 1960: rows of a mixed batch all went through the head of the active adapter."""
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, pad_token_id=0, num_labels=3)).double()
    filled(net, a=st.LoRA(r=4, train_modules=["score"]), b=st.LoRA(r=4, train_modules=["score"]), c=st.LoRA(r=2))
    ids = torch.randint(1, 60, (5, 6))
    rows = ["a", "b", None, "c", "a"]
    with torch.no_grad(), st.use(net, rows=rows):
        got = net(input_ids=ids).logits
    for i, name in enumerate(rows):
        with torch.no_grad(), st.use(net, name):
            torch.testing.assert_close(got[i : i + 1], net(input_ids=ids[i : i + 1]).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
def test_beams_stay_with_their_row(how: dict[str, int]) -> None:
    """peft 2283: beam search under adapter_names was a TypeError."""
    net = filled(llama(), a=st.LoRA(r=4), b=st.LoRA(r=3), c=st.LoRA(r=4))
    ids = torch.randint(1, 60, (4, 5))
    rows = ["a", "b", None, "c"]
    with torch.no_grad(), st.use(net, rows=rows):
        got = net.generate(ids, max_new_tokens=5, do_sample=False, **how)  # type: ignore[operator]
    k = how.get("num_return_sequences", 1)
    for i, name in enumerate(rows):
        with torch.no_grad(), st.use(net, name):
            assert torch.equal(got[i * k : (i + 1) * k], net.generate(ids[i : i + 1], max_new_tokens=5, do_sample=False, **how))  # type: ignore[operator]


def test_a_mistyped_name_is_an_error() -> None:
    """peft 2090: rows of an unknown adapter got the bare base, without a word."""
    net = filled(llama(), support=st.LoRA(r=4))
    with pytest.raises(st.NoSuchAdapter, match="support"):
        st.use(net, rows=["support", "suport"])


def test_a_dora_beside_loras() -> None:
    """peft 2089: a DoRA anywhere on the model, or in the batch, refused the mixed batch."""
    net = filled(llama(), a=st.LoRA(r=4), b=st.LoRA(r=4), d=st.DoRA(of=st.LoRA(r=4)))
    ids = torch.randint(1, 60, (4, 1))
    for rows in (["a", "b", None, "a"], ["a", "d", None, "b"]):
        with torch.no_grad(), st.use(net, rows=rows):
            got = net(input_ids=ids).logits
        for i, name in enumerate(rows):
            with torch.no_grad(), st.use(net, name):
                torch.testing.assert_close(got[i : i + 1], net(input_ids=ids[i : i + 1]).logits, rtol=1e-10, atol=1e-10)


def test_requests_of_two_threads_keep_their_adapters() -> None:
    """peft 804: concurrent services on one model got each other's adapters."""
    net = filled(llama(), **{f"a{i}": st.LoRA(r=4) for i in range(6)})
    ids = torch.randint(1, 60, (4, 1))
    batches = [["a0", "a1", "a2", None], ["a5", "a4", "a3", "a0"], ["a2", "a2", "a1", "a5"]]
    alone = []
    for rows in batches:
        with torch.no_grad(), st.use(net, rows=rows):
            alone.append(net(input_ids=ids).logits)
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(20):
            with torch.no_grad(), st.use(net, rows=batches[i]):
                if not torch.allclose(net(input_ids=ids).logits, alone[i], rtol=1e-10, atol=1e-10):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_adapter_that_comes_and_goes_while_others_serve() -> None:
    """S-LoRA and LoRAX: adapters are loaded and evicted between batches."""
    net = filled(llama(), a=st.LoRA(r=4), b=st.LoRA(r=4), c=st.LoRA(r=4))
    ids = torch.randint(1, 60, (4, 1))
    for i in range(12):
        filled(net, **{f"new{i}": st.LoRA(r=4 if i % 2 else 6)})
        rows = ["a", f"new{i}", "b", "c"]
        with torch.no_grad(), st.use(net, rows=rows):
            got = net(input_ids=ids).logits
        for j, name in enumerate(rows):
            with torch.no_grad(), st.use(net, name):
                torch.testing.assert_close(got[j : j + 1], net(input_ids=ids[j : j + 1]).logits, rtol=1e-10, atol=1e-10)
        st.detach(net, f"new{i}")
