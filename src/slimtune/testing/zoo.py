"""Tiny models of real classes, with random weights and inputs: transformers, diffusers, and plain PyTorch.

`Architecture` adds to a model what a check has to know of it: a batch of n rows, what counts as its output, what `generate` takes.
The classes and their options are the real ones; only the sizes are small. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.core.fold import first_tensor
from slimtune.testing.cases import rescale

Batch = dict[str, Tensor]
VOCAB = 99
IMAGE = 98  # the token that stands for a piece of the image in the LLaVA-like model


# ---- transformers -------------------------------------------------------------------------------------------------
def _hf(cls: str, config: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    return made


def llama(cls: str = "LlamaForCausalLM") -> nn.Module:
    return _hf(
        cls, "LlamaConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def llama_70b() -> nn.Module:
    """Return a Llama of the shape of the 70B models, on the meta device: shapes, no numbers."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def qwen3() -> nn.Module:
    return _hf(
        "Qwen3ForCausalLM", "Qwen3Config", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip


def gemma3() -> nn.Module:
    return _hf(
        "Gemma3ForCausalLM", "Gemma3TextConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def mistral() -> nn.Module:
    return _hf(
        "MistralForCausalLM", "MistralConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def mixtral() -> nn.Module:
    return _hf(
        "MixtralForCausalLM", "MixtralConfig", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=VOCAB, pad_token_id=0, experts_implementation="eager",
    )  # fmt: skip


def gpt2() -> nn.Module:
    return _hf(
        "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip


def bloom() -> nn.Module:
    return _hf("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB, pad_token_id=0)


def falcon() -> nn.Module:
    return _hf(
        "FalconForCausalLM", "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def bert(cls: str = "BertForSequenceClassification") -> nn.Module:
    return _hf(
        cls, "BertConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=128,
    )  # fmt: skip


def roberta() -> nn.Module:
    return _hf(
        "RobertaForSequenceClassification", "RobertaConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, vocab_size=VOCAB, max_position_embeddings=128,
    )  # fmt: skip


def distilbert() -> nn.Module:
    return _hf("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=VOCAB)


def deberta() -> nn.Module:
    return _hf(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=VOCAB, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    )  # fmt: skip


def modernbert() -> nn.Module:
    return _hf(
        "ModernBertForSequenceClassification", "ModernBertConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=VOCAB, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def t5(gated: bool = False) -> nn.Module:
    return _hf(
        "T5ForConditionalGeneration", "T5Config", d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCAB,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip


def bart() -> nn.Module:
    return _hf(
        "BartForConditionalGeneration", "BartConfig", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCAB, max_position_embeddings=128, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def vit() -> nn.Module:
    return _hf(
        "ViTForImageClassification", "ViTConfig", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip


def dinov2() -> nn.Module:
    return _hf(
        "Dinov2ForImageClassification", "Dinov2Config", hidden_size=32, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip


def clip() -> nn.Module:
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return _hf("CLIPModel", "CLIPConfig", text_config=text, vision_config=_clip_vision(), projection_dim=16)


def _clip_vision() -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def whisper() -> nn.Module:
    return _hf(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCAB, num_mel_bins=8, max_source_positions=20,
        max_target_positions=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip


def wav2vec2() -> nn.Module:
    return _hf(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, apply_spec_augment=False,
    )  # fmt: skip


def llava() -> nn.Module:
    import transformers

    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(**_clip_vision(), projection_dim=16)
    model: Any = _hf("LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision, image_token_id=IMAGE)
    model.generation_config.suppress_tokens = [IMAGE]  # a model that writes image tokens asks for images that are not there
    return model  # type: ignore[no-any-return]


# ---- diffusers ----------------------------------------------------------------------------------------------------
def _diffusers(cls: str, **options: Any) -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    made: nn.Module = getattr(diffusers, cls)(**options).eval()
    return made


def unet() -> nn.Module:
    return _diffusers(
        "UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def dit() -> nn.Module:
    return _diffusers(
        "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def flux() -> nn.Module:
    return _diffusers(
        "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def vae() -> nn.Module:
    return _diffusers(
        "AutoencoderKL", in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip


# ---- plain PyTorch ------------------------------------------------------------------------------------------------
class TinyText(nn.Module):
    """torch's own Transformer as a text classifier: modules that transformers never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.encoder(self.words(ids)).mean(1))
        return y


class TinyImage(nn.Module):
    """A residual network of convolutions and group norms, with a gated recurrent unit over its rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.block = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.memory = nn.GRU(16, 24, batch_first=True)
        self.mix = nn.Linear(24, 24)
        self.classifier = nn.Linear(24, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(pixels)))
        h = h + torch.relu(self.block(h))
        states, _ = self.memory(h.mean(3).transpose(1, 2))  # [n, height, channels]
        y: Tensor = self.classifier(torch.tanh(self.mix(states[:, -1])))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))


# ---- inputs -------------------------------------------------------------------------------------------------------
def _ids(n: int, length: int = 6) -> Tensor:
    ids = torch.randint(3, 90, (n, length))
    ids[:, 1], ids[:, 2] = 1, 2  # special tokens
    return ids


def _mask(n: int, left: bool, length: int = 6) -> Tensor:
    """Every second row is two tokens shorter."""
    mask = torch.ones(n, length, dtype=torch.long)
    mask[1::2, slice(0, 2) if left else slice(length - 2, None)] = 0
    return mask


def _decoder_only(n: int) -> Batch:
    return {"input_ids": _ids(n), "attention_mask": _mask(n, left=True)}


def _encoder(n: int) -> Batch:
    return {"input_ids": _ids(n), "attention_mask": _mask(n, left=False)}


def _encoder_decoder(n: int) -> Batch:
    return {**_encoder(n), "decoder_input_ids": _ids(n, 4)}


def _pixels(n: int) -> Batch:
    return {"pixel_values": torch.randn(n, 3, 16, 16, dtype=torch.float64)}


def _clip_batch(n: int) -> Batch:
    ids = _ids(n)
    ids[:, -1] = 2
    return {"input_ids": ids, **_pixels(n)}


def _llava_batch(n: int) -> Batch:
    ids = torch.cat([torch.full((n, 4), IMAGE), _ids(n, 3)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_pixels(n)}


def _whisper_batch(n: int) -> Batch:
    return {"input_features": torch.randn(n, 8, 40, dtype=torch.float64), "decoder_input_ids": _ids(n, 4)}


def _unet_batch(n: int) -> Batch:
    return {
        "sample": torch.randn(n, 4, 8, 8, dtype=torch.float64), "timestep": torch.randint(0, 1000, (n,)),
        "encoder_hidden_states": torch.randn(n, 5, 24, dtype=torch.float64),
    }  # fmt: skip


def _dit_batch(n: int) -> Batch:
    return {
        "hidden_states": torch.randn(n, 4, 8, 8, dtype=torch.float64), "timestep": torch.randint(0, 1000, (n,)),
        "class_labels": torch.randint(0, 10, (n,)),
    }  # fmt: skip


def _flux_batch(n: int) -> Batch:
    image = torch.zeros(16, 3, dtype=torch.float64)
    image[:, 1], image[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(n, 16, 4, dtype=torch.float64), "encoder_hidden_states": torch.randn(n, 5, 24, dtype=torch.float64),
        "pooled_projections": torch.randn(n, 16, dtype=torch.float64), "timestep": torch.rand(n, dtype=torch.float64),
        "img_ids": image, "txt_ids": torch.zeros(5, 3, dtype=torch.float64),
    }  # fmt: skip


# ---- the table ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Architecture:
    """One model of the table.

    Args:
        name: unique; the row of the table.
        make: () -> model in float32.
        batch: (n) -> the keyword arguments of a call on n rows; floats are float64.
        out: (what the model returns) -> [n, ...], rows first.
        fixed: arguments that are the same for every row, so that they are not cut.
        prompt: arguments of `generate`; empty: the model does not generate.
        dtype: in which everything is checked.
        rtol: how far two ways of computing the same may differ, relative to the largest entry.
        shared: patterns of modules that run once for the whole batch: with an op there, rows= must be refused.
        rows: why they do.
        group: a heading of the table.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    out: Callable[[Any], Tensor] = first_tensor
    fixed: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-9
    shared: tuple[str, ...] = ()
    rows: str = ""
    group: str = "transformers"

    def build(self) -> nn.Module:
        """Return the model in eval mode with weights of ordinary size, the same bits at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return rescale(self.make()).to(self.dtype).eval()

    def inputs(self, n: int) -> Batch:
        """Return a batch of n rows, the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in self.batch(n).items()}

    def one(self, batch: Batch, i: int) -> Batch:
        """Return row i of a batch, as a batch of one."""
        return {k: t if k in self.fixed else t[i : i + 1] for k, t in batch.items()}

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model and return what counts as its output, [n, ...]; what it makes of padding means nothing, and is zero here."""
        y, mask = self.out(model(**batch)), batch.get("attention_mask")
        if mask is None or "decoder_input_ids" in batch or y.shape[:2] != mask.shape:
            return y
        return y.masked_fill(mask[..., None] == 0, 0.0)

    def __str__(self) -> str:
        return self.name


def _plain(key: str, *shape: int) -> Callable[[int], Batch]:
    return lambda n: {key: torch.randn(n, *shape, dtype=torch.float64)}


_LM = ("input_ids", "attention_mask")
_ROUNDS = 2e-6  # norms or attention of this class compute in float32, whatever the model's type

ARCHITECTURES: list[Architecture] = [
    Architecture("Llama", llama, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("Qwen3", qwen3, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("Gemma-3", gemma3, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("Mistral", mistral, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("Mixtral", mixtral, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("GPT-2", gpt2, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("BLOOM", bloom, _decoder_only, prompt=_LM, dtype=torch.float32, rtol=1e-4),  # in float64 its mask makes NaN of padded rows
    Architecture("Falcon", falcon, _decoder_only, prompt=_LM, rtol=_ROUNDS),
    Architecture("BERT", bert, _encoder),
    Architecture("RoBERTa", roberta, _encoder),
    Architecture("DistilBERT", distilbert, _encoder),
    Architecture(
        "DeBERTa-v2", deberta, _encoder, rtol=_ROUNDS, shared=("pos_key_proj", "pos_query_proj", "rel_embeddings"),
        rows="its projections of relative positions (`pos_key_proj`, `pos_query_proj`) run once for the whole batch; leave them out with exclude=",
    ),
    Architecture("ModernBERT", modernbert, _encoder, rtol=_ROUNDS),
    Architecture("T5", t5, _encoder_decoder, prompt=_LM, rtol=_ROUNDS),
    Architecture("BART", bart, _encoder_decoder, prompt=_LM),
    Architecture("ViT", vit, _pixels),
    Architecture("DINOv2", dinov2, _pixels),
    Architecture("CLIP", clip, _clip_batch, out=lambda o: torch.cat([o.image_embeds, o.text_embeds], -1)),
    Architecture("Whisper", whisper, _whisper_batch, prompt=("input_features",)),
    Architecture("wav2vec2", wav2vec2, lambda n: {"input_values": torch.randn(n, 400, dtype=torch.float64)}),
    Architecture("LLaVA", llava, _llava_batch, prompt=(*_LM, "pixel_values"), rtol=_ROUNDS),
    Architecture("UNet2DCondition", unet, _unet_batch, group="diffusers", rtol=_ROUNDS),
    Architecture("DiT", dit, _dit_batch, group="diffusers", rtol=_ROUNDS),
    Architecture("Flux", flux, _flux_batch, fixed=("img_ids", "txt_ids"), group="diffusers", rtol=_ROUNDS),
    Architecture("AutoencoderKL", vae, _plain("sample", 3, 8, 8), group="diffusers", rtol=_ROUNDS),
    Architecture("nn.Sequential (MLP)", mlp, _plain("input", 12), group="plain PyTorch"),
    Architecture("nn.TransformerEncoder", TinyText, lambda n: {"ids": _ids(n)}, group="plain PyTorch"),
    Architecture("convolutions + GRU", TinyImage, _plain("pixels", 3, 8, 8), group="plain PyTorch"),
]


def architecture(name: str) -> Architecture:
    """Return the architecture of this name."""
    return next(a for a in ARCHITECTURES if a.name == name)
