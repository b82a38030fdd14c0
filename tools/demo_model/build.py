"""Construction of the untrained demo pipeline from CogVideoX's classes, and saving."""

from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .world import BASE_SIZE, words

# diffusers imports its classes lazily, so type checkers don't know their members.
_classes: Any = diffusers
Pipeline: TypeAlias = Any
Vae: TypeAlias = Any
Transformer: TypeAlias = Any

LATENT_CHANNELS = 8
TEXT_TOKENS = 32
TEXT_DIM = 128
_LEVELS = (16, 32, 64)


def build_vae() -> Vae:
    """Return an untrained VAE: 17 x 64 x 64 frames to 5 x 16 x 16 latents of 8 channels."""
    return _classes.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(_LEVELS),
        up_block_types=("CogVideoXUpBlock3D",) * len(_LEVELS),
        block_out_channels=_LEVELS,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=4,
        sample_height=BASE_SIZE.height,
        sample_width=BASE_SIZE.width,
        scaling_factor=1.0,
    )


def build_transformer() -> Transformer:
    """Return an untrained transformer of 8 layers x 3 heads x 64 whose blocks start as identity."""
    transformer = _classes.CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=96,
        text_embed_dim=TEXT_DIM,
        num_layers=8,
        sample_width=BASE_SIZE.width // 4,
        sample_height=BASE_SIZE.height // 4,
        sample_frames=BASE_SIZE.num_frames,
        patch_size=1,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
    )
    modulations = [m for m in transformer.modules() if type(m).__name__ == "CogVideoXLayerNormZero"]
    for layer in [m.linear for m in modulations] + [transformer.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_tokenizer() -> T5Tokenizer:
    """Return a Unigram tokenizer with one token per word; unknown words are split into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz,.'-0123456789"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"▁{word}", -2.0) for word in words()]
    vocab += [("▁", -6.0)] + [(letter, -8.0) for letter in letters if f"▁{letter}" not in dict(vocab)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """Return an untrained T5 encoder of 2 layers."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_scheduler() -> Any:
    """Return the scheduler: v-prediction, zero terminal SNR, trailing steps."""
    return _classes.CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
    )


def build_pipeline(seed: int = 0) -> Pipeline:
    """Return the complete untrained pipeline, deterministic for each seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return _classes.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=build_vae(),
        transformer=build_transformer(),
        scheduler=build_scheduler(),
    )


def save_pipeline(pipeline: Pipeline, folder: Path) -> int:
    """Save as fp16 safetensors in the Hub's folder layout; return the total size in bytes."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
