"""The stream port: virtual tokens in forward passes and in generate, against the bare base with concatenated embeddings, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimtune as st
from slimtune.core.errors import CapabilityError, PlanError, SpecError, TargetError
from slimtune.ports.frame import frame
from slimtune.ports.transformers_internals import cache_in
from slimtune.testing import zoo
from slimtune.testing.cases import rescale
from slimtune.testing.subject import fill

TEXTS = [torch.tensor(t) for t in ([17, 8, 31, 44], [9, 61], [5, 71, 33, 12, 90, 28], [50, 51, 52])]
MIXED: list[Any] = ["a", None, "b", ["b", "a"]]
L = 6


def prompted(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model with adapters "a" of 3 and "b" of 5 virtual tokens."""
    torch.manual_seed(1)
    model = rescale(getattr(zoo, name)()).to(dtype).eval()
    for adapter, p in (("a", 3), ("b", 5)):
        st.attach(model, st.PromptTuning(tokens=p, train_modules=()), name=adapter)
        fill(model, adapter, 0.5)
    return model


def tokens(model: Any, which: Any) -> Tensor | None:
    """The virtual tokens of a plan, by hand."""
    names = [] if which is None else [which] if isinstance(which, str) else which
    found = [next(op for op in model.slim_state.adapters[n].ops.values() if op.port == "stream").prompt.detach() for n in names]
    return torch.cat(found) if found else None


def embedded(model: Any, ids: Tensor, which: Any) -> Tensor:
    """[p + n, d] of one row."""
    x = model.get_input_embeddings()(ids)
    prompt = tokens(model, which)
    return x if prompt is None else torch.cat([prompt.to(x.dtype), x])


def padded(side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    rows, masks = [], []
    for t in TEXTS:
        gap, ones = torch.full((L - len(t),), pad), torch.ones(len(t), dtype=torch.long)
        rows.append(torch.cat([gap, t] if side == "left" else [t, gap]))
        masks.append(torch.cat([torch.zeros_like(gap), ones] if side == "left" else [ones, torch.zeros_like(gap)]))
    return torch.stack(rows), torch.stack(masks)


def continuation(model: Any, ids: Tensor, which: Any, steps: int) -> list[int]:
    """Greedy ids of one row: the bare base, no cache, no mask, no padding; never the end-of-sequence token."""
    out: list[int] = []
    with st.disabled(model), torch.no_grad():
        for _ in range(steps):
            row = torch.cat([ids, torch.tensor(out, dtype=torch.long)])
            logits = model(inputs_embeds=embedded(model, row, which)[None], use_cache=False).logits[0, -1]
            logits[2] = -torch.inf
            out.append(int(logits.argmax()))
    return out


# ---- the frame --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("causal", [True, False])
def test_a_frame_puts_everything_where_its_row_alone_has_it(causal: bool) -> None:
    counts, mask = [2, 0, 3, 1], torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    at = frame(counts, 0, mask, causal, mask.device)
    virtual = torch.tensor([[0, 101, 102], [0, 0, 0], [301, 302, 303], [0, 0, 401]])
    given = torch.tensor([[-1, -1, 13, 14], [-1, 22, 23, 24], [31, 32, 33, 34], [41, 42, -1, -1]])
    out = at.arrange(torch.cat([virtual, given], 1))
    seen = at.mask(mask)
    want = [[101, 102, 13, 14], [22, 23, 24], [301, 302, 303, 31, 32, 33, 34], [401, 41, 42]]
    places = at.positions(at.by_itself(4, 0, 0, mask.device), 0, True)
    for i, row in enumerate(want):
        assert out[i][seen[i] == 1].tolist() == row
        if counts[i]:
            assert places[i][seen[i] == 1].tolist() == list(range(len(row)))
    for i, row in enumerate(at.strip(out)):
        assert row[mask[i] == 1].tolist() == given[i][mask[i] == 1].tolist()


# ---- forward ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3", "bloom", "bert", "roberta", "distilbert", "deberta", "modernbert", "t5", "bart", "llava"]
)
def test_rows_with_different_prompts_give_what_they_give_alone(name: str, side: str) -> None:
    """In a padded batch; left padding only where the bare base itself does not mind it."""
    minds = name in {"bert", "roberta", "distilbert", "deberta", "modernbert", "bart"}
    model = prompted(name, torch.float32 if name == "bloom" else torch.float64)  # BLOOM in float64 makes NaN of a row's masked start
    decoder = {"decoder_input_ids": torch.tensor([[3, 4, 5]] * 4)} if name in {"t5", "bart"} else {}
    ids, mask = padded("right" if minds else side, model.config.get_text_config().pad_token_id or 0)
    with torch.no_grad(), st.use(model, rows=MIXED):
        out = model(ids, attention_mask=mask, **decoder).logits
    for i, (text, which) in enumerate(zip(TEXTS, MIXED, strict=True)):
        if name == "gpt2" and side == "left" and which is None:
            continue  # without a prompt the bare base counts positions from the padding
        with torch.no_grad(), st.disabled(model):
            x = embedded(model, text, which)[None]
            alone = model(inputs_embeds=x, **{k: v[:1] for k, v in decoder.items()}).logits[0]
        whole = bool(decoder) or out.dim() == 2
        got = out[i] if whole else out[i][mask[i] == 1]
        want = alone if whole else alone[-len(text) :]
        if name in {"roberta", "distilbert", "deberta", "modernbert"}:
            with torch.no_grad(), st.use(model, which):  # their heads read the first real token, which concatenation would not give
                want = model(text[None]).logits[0]
        assert torch.allclose(got, want, atol=1e-5 if name == "bloom" else 2e-6), (name, which)


@pytest.mark.parametrize("side", ["right", "left"])
def test_roberta_counts_what_is_no_pad_in_rows_without_virtual_tokens(side: str) -> None:
    """Also where a token that is seen has the id of the pad; each row is as it is alone, with its prefix, its prompt or neither."""
    model = prompted("roberta")
    st.attach(model, st.PrefixTuning(p=4), name="c")
    ids, mask = padded(side)
    ids[0, mask[0].argmax() + 1] = ids[2, 3] = ids[3, mask[3].argmax()] = 0
    plan: list[Any] = ["a", None, None, "c"]
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx == 0 and m.num_embeddings == 128)
    seen: list[Tensor] = []
    handle = table.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for mixed in (plan, [None, *plan[1:]], ["c", *plan[1:]], ["a", "b", "c", ["c", "a"]]):
        with torch.no_grad(), st.use(model, rows=mixed):
            out = model.roberta(ids, attention_mask=mask)[0]
        for i, which in enumerate(mixed):
            with torch.no_grad(), st.use(model, which):
                alone = model.roberta(ids[i][mask[i] == 1][None])[0][0]
            assert torch.allclose(out[i][mask[i] == 1], alone, atol=1e-12), (mixed, which)
    with torch.no_grad(), st.use(model, "c"):
        model(ids)
    assert torch.equal(seen[-1][ids == 0], torch.zeros_like(ids[ids == 0]))  # the prefix moves what is counted, and nothing else
    handle.remove()


def test_hidden_states_and_attentions_have_the_users_length() -> None:
    model = prompted("llama", torch.float32)
    model.set_attn_implementation("eager")
    ids, mask = padded("right")
    with torch.no_grad(), st.use(model, rows=MIXED):
        out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        short = model(ids, attention_mask=mask, return_dict=False)
    assert {t.shape[1] for t in out.hidden_states} == {L}
    assert {tuple(t.shape[2:]) for t in out.attentions} == {(L, L + 8)}  # each token still shows what it gave to the virtual ones
    assert torch.equal(short[0], out.logits)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_positions_of_the_caller_move_with_the_prompt() -> None:
    model = prompted("gpt2")
    ids = torch.stack([TEXTS[2]] * 2)
    own = torch.tensor([[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8]])
    with torch.no_grad(), st.use(model, rows=["a", "b"]):
        out = model(ids, position_ids=own).logits
    for i, p in enumerate((3, 5)):
        with torch.no_grad(), st.disabled(model):
            places = torch.cat([torch.arange(p), own[i] + p])[None]
            alone = model(inputs_embeds=embedded(model, ids[i], "ab"[i])[None], position_ids=places).logits[0, p:]
        assert torch.allclose(out[i], alone, atol=1e-6)


def test_positions_in_three_dimensions() -> None:
    """A text model inside a vision-language model has positions [3, batch, tokens], which its own model computes and goes on counting."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    special = {"image_token_id": 95, "video_token_id": 96, "vision_start_token_id": 97, "vision_end_token_id": 98}
    model: Any = rescale(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))).double().eval()
    for name, p in (("a", 3), ("b", 5)):
        assert [r.path for r in st.attach(model, st.PromptTuning(tokens=p), name=name).rows] == ["model.language_model"]
        fill(model, name, 0.5)
    ids, mask = padded("left")
    with torch.no_grad(), st.use(model, rows=MIXED):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2)
    for i, (row, which) in enumerate(zip(TEXTS, MIXED, strict=True)):
        model.model.rope_deltas = None  # of the batch before
        assert out[i, L:].tolist() == continuation(model, row, which, 4), which


def test_an_op_without_tokens_moves_positions() -> None:
    """What prefix tuning needs of this port."""
    from slimtune.ports.stream import StreamOp

    model = prompted("gpt2")
    op: Any = next(iter(model.slim_state.adapters["a"].ops.values()))
    model.transformer.slim.put("a", "stream", StreamOp.__new__(StreamOp))
    shifted = model.transformer.slim.ops("a")[0]
    nn.Module.__init__(shifted)
    shifted.port, shifted.tokens, shifted.shift = "stream", 0, 4
    model.slim_state.adapters["a"].ops = {("transformer", "stream"): shifted}
    ids, mask = padded("left")
    with torch.no_grad(), st.use(model, rows=["a", "a", "b", None]):
        out = model(ids, attention_mask=mask).logits
        made = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    for i in (0, 1):
        row = TEXTS[i]
        with torch.no_grad(), st.disabled(model):
            alone = model(row[None], position_ids=torch.arange(len(row))[None] + 4).logits[0]
            longer = made[i, -len(row) - 2 :][None]
            again = model(longer, position_ids=torch.arange(len(row) + 2)[None] + 4).logits[0]
        assert torch.allclose(out[i, L - len(row) :], alone, atol=1e-6)
        assert again[-3:-1].argmax(-1).tolist() == made[i, -2:].tolist()
    assert op.tokens == 3


# ---- training ---------------------------------------------------------------------------------------------------------
def test_losses_need_no_longer_labels() -> None:
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # what follows the last virtual token is not predicted, as the first token never is
    model = prompted("llama")
    st.use(model, "a")
    st.lean(model)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    prompt = next(iter(model.slim_state.adapters["a"].ops.values())).prompt
    with st.disabled(model):
        leaf = prompt.detach().clone().requires_grad_()
        x = torch.cat([leaf.expand(4, -1, -1), model.get_input_embeddings()(ids)], 1)
        ahead = torch.ones(4, 3, dtype=torch.long)
        want = model(inputs_embeds=x, attention_mask=torch.cat([ahead, mask], 1), labels=torch.cat([ahead * -100, labels], 1)).loss
    want.backward()
    assert torch.allclose(loss, want, atol=1e-6)
    assert torch.allclose(prompt.grad, leaf.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_classes_and_sequences_train(name: str) -> None:
    model = prompted(name)
    ids, mask = padded("right")
    labels = torch.tensor([0, 1, 1, 0]) if name == "bert" else torch.tensor([[3, 4, 1]] * 4)
    st.trainable(model, ["a", "b"])
    optimiser = torch.optim.Adam(st.param_groups(model, lr=3e-2))
    losses: list[float] = []
    with st.use(model, rows=MIXED):
        for _ in range(8):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- generate ---------------------------------------------------------------------------------------------------------
GENERATION: dict[str, dict[str, Any]] = {
    "cache": {}, "static cache": {"cache_implementation": "static"}, "no cache": {"use_cache": False},
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_generate_equals_the_base_with_concatenated_embeddings(name: str, how: str) -> None:
    model = prompted(name, torch.float32 if name == "bloom" else torch.float64)
    ids, mask = padded("left")
    with st.use(model, rows=MIXED):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2, **GENERATION[how]
        )
    for i, (text, which) in enumerate(zip(TEXTS, MIXED, strict=True)):
        assert out[i, L:].tolist() == continuation(model, text, which, 5), which


def test_generate_without_padding_uses_no_mask() -> None:
    model = prompted("llama")
    text = TEXTS[2]
    for extra in ({}, {"cache_implementation": "static"}):
        with st.use(model, rows=["b", None]):
            out = model.generate(
                torch.stack([text, text]), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2, **extra
            )
        assert [row[L:].tolist() for row in out] == [continuation(model, text, w, 4) for w in ("b", None)]


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 8}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beams_and_samples(name: str, options: dict[str, Any]) -> None:
    """Rows are repeated for beams: each gives what the base gives with its prompt in inputs_embeds."""
    model = prompted(name)
    common: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **options}
    ids = torch.stack([TEXTS[2], TEXTS[2].flip(0)])
    if options.get("do_sample"):
        ids = ids[:1]  # numbers are drawn for the whole batch at once
    plan = ["a", "b"][: len(ids)]
    torch.manual_seed(3)
    with st.use(model, rows=plan):
        out = model.generate(ids, **common)
    want = []
    for i, which in enumerate(plan):
        torch.manual_seed(3)
        with st.disabled(model), torch.no_grad():
            x = embedded(model, ids[i], which)[None]
            want += model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), **common).tolist()
    assert [[t for t in row if t] for row in out[:, L:].tolist()] == [[t for t in row if t] for row in want]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_generate(name: str, options: dict[str, Any]) -> None:
    model = prompted(name)
    ids, mask = padded("right", model.config.pad_token_id)
    common: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, **options}
    with st.use(model, rows=MIXED):
        out = model.generate(input_ids=ids, attention_mask=mask, **common)
    for i, (text, which) in enumerate(zip(TEXTS, MIXED, strict=True)):
        with st.disabled(model), torch.no_grad():
            x = embedded(model, text, which)[None]
            want = model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), **common)[0].tolist()
        assert out[i, : len(want)].tolist() == want, which
        assert set(out[i, len(want) :].tolist()) <= {model.config.pad_token_id}


def test_a_cache_by_hand() -> None:
    from transformers import DynamicCache

    model = prompted("gpt2")
    text = TEXTS[2]
    with torch.no_grad(), st.use(model, rows=["b", "a"]):
        whole = model(torch.stack([text, text])).logits
        cache = DynamicCache()
        model(torch.stack([text[:4]] * 2), past_key_values=cache)
        last = [model(torch.stack([text[i : i + 1]] * 2), past_key_values=cache).logits for i in (4, 5)]
    assert torch.allclose(torch.cat(last, 1), whole[:, 4:], atol=1e-6)
    assert cache.get_seq_length() == 5 + 6
    with st.use(model, "a"), pytest.raises(PlanError, match="cache was filled without"):
        model(text[None].expand(2, -1), past_key_values=cache)


def test_a_mask_as_long_as_a_window_is_no_mask_of_a_whole_cache() -> None:
    model = prompted("gemma3")
    text = TEXTS[2][None, : model.config.sliding_window]
    with torch.no_grad(), st.use(model, "a"):
        whole = model(text).logits
        out = model(text[:, :-1], attention_mask=torch.ones_like(text[:, :-1]), use_cache=True)
        last = model(text[:, -1:], attention_mask=torch.ones_like(text), past_key_values=cache_in(out)).logits
    assert torch.allclose(last, whole[:, -1:], atol=1e-6)


def test_generate_takes_an_empty_cache_of_ones_own() -> None:
    from transformers import DynamicCache

    model = prompted("gemma3")
    st.use(model, "a")
    text = TEXTS[2][None]
    common: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(text, **common)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        assert torch.equal(model.generate(text, past_key_values=cache, **common), want)


def test_what_generate_refuses() -> None:
    from transformers import DynamicCache, StaticCache

    model = prompted("llama")
    st.use(model, "a")
    ids = TEXTS[2][None]
    common: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(CapabilityError, match="assisted") as caught:
        model.generate(ids, prompt_lookup_num_tokens=2, **common)
    assert caught.value.hint
    with pytest.raises(CapabilityError, match="chunks"):
        model.generate(ids, prefill_chunk_size=2, **common)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(CapabilityError, match="filled cache"):
        model.generate(torch.cat([ids, ids], 1), past_key_values=cache, **common)
    with pytest.raises(PlanError, match="places"):
        model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=L + 3), **common)
    roomy = StaticCache(config=model.config, max_cache_len=L + 3 + 3)
    assert model.generate(ids, past_key_values=roomy, **common).tolist() == model.generate(ids, **common).tolist()
    with st.use(model, None):
        assert model.generate(ids, prompt_lookup_num_tokens=2, **common).shape[1] <= L + 3


# ---- refusals ---------------------------------------------------------------------------------------------------------
def test_what_a_forward_refuses() -> None:
    model = prompted("llama")
    st.use(model, "a")
    ids = TEXTS[2][None]
    with pytest.raises(PlanError, match=r"attention_mask is \[1, 1, 6, 6\]"):
        model(ids, attention_mask=torch.zeros(1, 1, L, L))
    with pytest.raises(CapabilityError, match="packed"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(CapabilityError, match="marks"):
        model.model(ids, marks=torch.zeros(1, L))
    with pytest.raises(CapabilityError, match="3, 5 tokens long") as caught, st.use(model, {"a": 0.5, "b": 0.5}):
        model(ids)
    assert "stack" in caught.value.hint
    short = prompted("gpt2")
    st.use(short, "b")
    most = short.config.max_position_embeddings
    short(torch.ones(1, most - 5, dtype=torch.long))
    with pytest.raises(PlanError, match=f"more than the {most} positions"):
        short(torch.ones(1, most - 4, dtype=torch.long))
    bart: Any = prompted("bart")
    st.use(bart, "a")
    encoded = bart.get_encoder()(ids)
    with st.use(bart, ["a", "b"]), pytest.raises(PlanError, match="same plan"):
        bart(attention_mask=torch.ones(1, L), encoder_outputs=encoded, decoder_input_ids=ids)
    with pytest.raises(CapabilityError):
        st.merge(model, "a")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "whisper"])
def test_more_tokens_than_positions(name: str, method: str) -> None:
    """Whether by themselves, in a stack or with the input."""
    model: Any = getattr(zoo, name)()
    most = 127 if name == "roberta" else 128  # RoBERTa's first position is 1 here
    config = model.config
    fixed = {"input_features": torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)} if name == "whisper" else {}

    def spec(p: int) -> Any:
        return st.PrefixTuning(p=p) if method == "prefix" else st.PromptTuning(tokens=p, targets="model.decoder" if fixed else "auto")

    def forward(n: int, **given: Any) -> None:
        with torch.no_grad():
            model(**{"decoder_input_ids" if fixed else "input_ids": torch.full((1, n), 7)}, **fixed, **given)

    with pytest.raises(SpecError, match=f"none of its {most} positions.*use fewer") as caught:
        st.attach(model, spec(most))
    assert caught.value.where
    assert caught.value.hint
    for adapter in ("a", "b"):
        st.attach(model, spec(100), name=adapter)
    with st.use(model, "a"):
        forward(most - 100)
        with pytest.raises(PlanError, match=f"more than the {most} positions") as late:
            forward(most - 99)
        assert late.value.hint == f"cut the input to {most - 100} tokens"
        name = "decoder_position_ids" if fixed else "position_ids"
        with pytest.raises(PlanError, match="go up to 60"):
            forward(4, **{name: torch.tensor([[1, 2, 3, 60]])})
    with st.use(model, ["a", "b"]), pytest.raises(PlanError) as both:
        forward(4)
    assert both.value.hint == f"use prompts of less than {most} tokens in all"


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "whisper", "wav2vec2"])
def test_models_without_a_place_for_virtual_tokens(name: str) -> None:
    model = getattr(zoo, name)()
    with pytest.raises((TargetError, SpecError)) as caught:
        st.attach(model, st.PromptTuning())
    assert "prefix" in caught.value.hint
    assert "slim_state" not in model.__dict__


def test_targets() -> None:
    model = zoo.llava()
    report = st.attach(model, st.PromptTuning(tokens=2))
    assert [r.path for r in report.rows] == ["model.language_model"]
    with pytest.raises(TargetError, match="innermost") as caught:
        st.attach(zoo.llama(), st.PromptTuning(targets="re:"))
    assert 'targets="model"' in caught.value.hint
    with pytest.raises(SpecError, match="width=d"):
        st.attach(nn.Sequential(nn.Sequential(nn.Linear(4, 4))), st.PromptTuning(targets="0"))
    with pytest.raises(SpecError, match="wide"):
        st.attach(zoo.llama(), st.PromptTuning(width=7))


# ---- other modules ----------------------------------------------------------------------------------------------------
class Mean(nn.Module):
    """Adds to each token the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.map(x + x.mean(1, keepdim=True))


def test_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": Mean()}).double()
    model.forward = lambda *a: model["body"](*a)  # type: ignore[method-assign]
    for name, p in (("a", 2), ("b", 3)):
        st.attach(model, st.PromptTuning(targets="body", width=8, tokens=p), name=name)
        fill(model, name)
    body: Any = model["body"]
    a, b = (body.slim.ops(n)[0].prompt for n in "ab")
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with st.use(model, rows=["a", None, ["a", "b"]]):
        out = model(x)
    for i, prompt in enumerate((a, a[:0], torch.cat([a, b]))):
        with st.disabled(model):
            want = model(torch.cat([prompt, x[i]])[None])[0, len(prompt) :]
        assert torch.allclose(out[i], want)
    st.use(model, "a")
    with pytest.raises(CapabilityError, match="may count its tokens"):
        model(x, torch.ones(3, 4, 1))
    with pytest.raises(PlanError, match="batch, tokens, width"):
        model(x[0])
