"""Pipelines of the support table that are built of a tiny transformer and a scheduler alone.

Prompts are given as embeddings, and latents are returned: no text encoder and no VAE is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsetune.models.random_weights import blueprint, build_component
from tests.models.cases import STILL, VIDEO, Case, clip_encoder, drawn, image


@dataclass(frozen=True)
class BareCase(Case):
    """A `Case` whose `transformer` is the whole configuration of a transformer of this class.

    Where there are `inputs`, the transformer is called with them in each step in place of the pipeline's own code.
    """

    kind: str = ""
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    schedule: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    time: str = "timestep"  # the name of that argument


def bare(
    pipeline: str,
    kind: str,
    transformer: dict[str, Any],
    arguments: dict[str, Any],
    parts: Callable[[Any], dict[str, Any]] = lambda made: {},
    **rest: Any,
) -> BareCase:
    return BareCase(pipeline, "transformer", arguments, transformer, parts, kind=kind, **rest)


def component(plan: str, name: str) -> Callable[[Any], dict[str, Any]]:
    """A component of a blueprint."""
    return lambda made: {name: build_component(blueprint(plan), name, "tiny")}


def guider(made: Any) -> dict[str, Any]:
    from diffusers import ClassifierFreeGuidance

    return {"guider": ClassifierFreeGuidance(guidance_scale=1.0)}


def places(frames: int, height: int, width: int, offset: int = 0) -> torch.Tensor:
    """Frame, row and column of each token, in raster order."""
    return torch.cartesian_prod(*(torch.arange(length) + offset for length in (frames, height, width)))


def line(tokens: int, first: int = 0) -> torch.Tensor:
    """Positions of text or audio."""
    return torch.stack([torch.arange(tokens) + first, torch.zeros(tokens), torch.zeros(tokens)], -1).long()


def four(ids: torch.Tensor) -> torch.Tensor:
    """Positions with a fourth coordinate."""
    return torch.cat([ids, ids[:, :1] * 0], -1)


def mask(tokens: int = 32, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.ones(1, tokens, dtype=dtype)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}
PAIR = {"num_layers": 1, "num_single_layers": 1}
EMBEDS = {"prompt": None, "negative_prompt": None, "prompt_embeds": drawn(1, 32, 32)}
BOTH = EMBEDS | {"negative_prompt_embeds": drawn(1, 32, 32)}
MASKED = BOTH | {"prompt_attention_mask": mask(), "negative_prompt_attention_mask": mask()}
FLUX = HEADS | PAIR | {"in_channels": 64, "joint_attention_dim": 32, "axes_dims_rope": (8, 28, 28)}
FLUX2 = HEADS | PAIR | {"in_channels": 64, "joint_attention_dim": 32, "axes_dims_rope": (16, 16, 16, 16)}
KANDINSKY = {
    "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 16, "model_dim": 128,
    "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (16, 24, 24),
}  # fmt: skip
QWEN_AND_CLIP = {
    "prompt": None, "negative_prompt": None, "guidance_scale": 1.0, "prompt_embeds_qwen": drawn(1, 32, 32),
    "prompt_embeds_clip": drawn(1, 32), "prompt_cu_seqlens": torch.tensor([0, 32], dtype=torch.int32),
}  # fmt: skip
HUNYUAN_DIT = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "hidden_size": 128, "in_channels": 4,
    "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 32, "sample_size": 32,
    "patch_size": 2, "text_len": 32, "text_len_t5": 32,
}  # fmt: skip
PIXART = {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128, "sample_size": 32,
    "caption_channels": 32, "in_channels": 4,
}  # fmt: skip
Z_IMAGE = {
    "dim": 128, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
    "axes_dims": [16, 24, 24], "axes_lens": [512, 64, 64],
}  # fmt: skip
LISTED = {"prompt": None, "prompt_embeds": [drawn(1, 32, 32)[0]], "negative_prompt_embeds": [drawn(1, 32, 32)[0]]}
WAN = HEADS | {"num_layers": 1, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 64}

CHROMA = FLUX | {"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16}
CHROMA_MASKS = {name: mask(dtype=torch.bool) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
JOY = {"hidden_size": 128, "num_attention_heads": 2, "text_dim": 32, "num_layers": 1, "rope_dim_list": [16, 24, 24]}
VAE = component("flux-dev", "vae")
WAN_VAE = component("wan2.1-t2v-1.3b", "vae")


def flux2_vae(made: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2

    shape = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    return {"vae": AutoencoderKLFlux2(**shape).eval()}


BARE_CASES = (
    bare(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        HEADS
        | {
            "num_mmdit_layers": 1, "num_single_dit_layers": 1, "caption_projection_dim": 128, "joint_attention_dim": 32,
            "pos_embed_max_size": 1024, "sample_size": 32,
        },
        STILL | MASKED,
    ),
    bare("BriaPipeline", "BriaTransformer2DModel", FLUX | {"in_channels": 16}, STILL | BOTH, VAE),
    bare("ChromaPipeline", "ChromaTransformer2DModel",
         CHROMA, STILL | BOTH | CHROMA_MASKS),
    bare("CogView3PlusPipeline", "CogView3PlusTransformer2DModel",
         HEADS | {"num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 16,
                  "pos_embed_max_size": 32, "sample_size": 32},
         STILL | BOTH, scheduler="CogVideoXDDIMScheduler"),
    bare("CogView4Pipeline", "CogView4Transformer2DModel",
         HEADS | {"num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 16,
                  "rope_axes_dim": (64, 64), "sample_size": 32},
         STILL | BOTH),
    bare("ErnieImagePipeline", "ErnieImageTransformer2DModel",
         {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 64, "text_in_dim": 32,
          "rope_axes_dim": (16, 24, 24)},
         {"height": 256, "width": 256, "prompt": None, "prompt_embeds": [drawn(32, 32)],
          "negative_prompt_embeds": [drawn(32, 32)]}),
    bare("Flux2Pipeline", "Flux2Transformer2DModel", FLUX2, STILL | EMBEDS),
    bare("Flux2KleinPipeline", "Flux2Transformer2DModel", FLUX2 | {"guidance_embeds": False}, STILL | BOTH, flux2_vae),
    bare("HiDreamImagePipeline", "HiDreamImageTransformer2DModel",
         HEADS | PAIR | {"in_channels": 16, "out_channels": 16, "patch_size": 2, "caption_channels": [32, 32],
                         "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 1,
                         "axes_dims_rope": (16, 24, 24), "max_resolution": (32, 32), "llama_layers": (0, 1)}, {},
         time="timesteps",
         inputs={"hidden_states": drawn(1, 16, 32, 32), "encoder_hidden_states_t5": drawn(1, 32, 32),
                 "encoder_hidden_states_llama3": drawn(2, 1, 32, 32), "pooled_embeds": drawn(1, 64)}),
    bare("HunyuanDiTPipeline", "HunyuanDiT2DModel", HUNYUAN_DIT,
         STILL | MASKED | {"use_resolution_binning": False, "prompt_embeds_2": drawn(1, 32, 32),
                           "negative_prompt_embeds_2": drawn(1, 32, 32), "prompt_attention_mask_2": mask(),
                           "negative_prompt_attention_mask_2": mask()},
         scheduler="DDPMScheduler"),
    bare("HunyuanImagePipeline", "HunyuanImageTransformer2DModel",
         HEADS | PAIR | {"in_channels": 16, "out_channels": 16, "num_refiner_layers": 1, "patch_size": (1, 1),
                         "text_embed_dim": 32, "text_embed_2_dim": 32, "rope_axes_dim": (32, 32)},
         STILL | EMBEDS | {"prompt_embeds_mask": mask(), "prompt_embeds_2": drawn(1, 32, 32),
                           "prompt_embeds_mask_2": mask()}),
    bare("Krea2Pipeline", "Krea2Transformer2DModel",
         HEADS | {"num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 32,
                  "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2,
                  "text_num_key_value_heads": 1, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
                  "num_refiner_text_blocks": 1, "axes_dims_rope": (16, 24, 24)},
         STILL | {"prompt": None, "negative_prompt": None, "prompt_embeds": drawn(1, 32, 2, 32),
                  "prompt_embeds_mask": mask(dtype=torch.bool),
                  "negative_prompt_embeds": drawn(1, 32, 2, 32),
                  "negative_prompt_embeds_mask": mask(dtype=torch.bool)}),
    bare("LongCatImagePipeline", "LongCatImageTransformer2DModel", FLUX | {"pooled_projection_dim": 32}, {},
         inputs={"hidden_states": drawn(1, 320, 64), "encoder_hidden_states": drawn(1, 32, 32), "txt_ids": line(32),
                 "img_ids": torch.cat([places(1, 16, 16, 32), places(1, 8, 8, 33)]), "guidance": None}),
    bare("Lumina2Pipeline", "Lumina2Transformer2DModel",
         {"hidden_size": 128, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
          "multiple_of": 16, "axes_dim_rope": (16, 24, 24), "cap_feat_dim": 32, "sample_size": 32},
         STILL | MASKED),
    bare("LuminaPipeline", "LuminaNextDiT2DModel",
         {"hidden_size": 128, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16,
          "cross_attention_dim": 32, "sample_size": 32},
         STILL | MASKED),
    bare("OvisImagePipeline", "OvisImageTransformer2DModel", FLUX, STILL | BOTH),
    bare("PixArtAlphaPipeline", "PixArtTransformer2DModel", PIXART, STILL | MASKED | {"use_resolution_binning": False},
         scheduler="DPMSolverMultistepScheduler"),
    bare("PixArtSigmaPipeline", "PixArtTransformer2DModel", PIXART, STILL | MASKED | {"use_resolution_binning": False},
         scheduler="DPMSolverMultistepScheduler"),
    bare("ZImagePipeline", "ZImageTransformer2DModel", Z_IMAGE, STILL | LISTED),
    bare("ZImageImg2ImgPipeline", "ZImageTransformer2DModel", Z_IMAGE,
         STILL | LISTED | {"image": image(256, 256), "strength": 1.0}, VAE),
    bare("AnyFlowPipeline", "AnyFlowTransformer3DModel", WAN | {"cross_attn_norm": True, "deltatime_type": "r"},
         VIDEO | BOTH, scheduler="FlowMapEulerDiscreteScheduler"),
    bare("ChronoEditPipeline", "ChronoEditTransformer3DModel", WAN | {"in_channels": 36, "image_dim": 32},
         VIDEO | BOTH | {"image": image()}, lambda made: WAN_VAE(made) | clip_encoder(made)),
    bare("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", KANDINSKY, VIDEO | QWEN_AND_CLIP),
    bare("HeliosPipeline", "HeliosTransformer3DModel",
         HEADS | {"num_layers": 1, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "rope_dim": (16, 24, 24)},
         VIDEO | BOTH | {"height": 64, "width": 96}, WAN_VAE, scheduler="HeliosScheduler",
         schedule={"stage_range": [0, 1], "stages": 1, "use_dynamic_shifting": True}),
    bare("MotifVideoPipeline", "MotifVideoTransformer3DModel",
         HEADS | PAIR | {"text_embed_dim": 32, "rope_axes_dim": (16, 24, 24)}, VIDEO | MASKED,
         lambda made: WAN_VAE(made) | guider(made)),
    bare("BriaFiboPipeline", "BriaFiboTransformer2DModel",
         FLUX | {"joint_attention_dim": 64, "text_encoder_dim": 32}, {},
         inputs={"hidden_states": drawn(1, 256, 64), "encoder_hidden_states": drawn(1, 32, 64),
                 "text_encoder_layers": [drawn(1, 32, 32)] * 2, "pooled_projections": None,
                 "img_ids": places(1, 16, 16), "txt_ids": line(32) * 0, "joint_attention_kwargs": {}}),
    bare("BriaFibo2Pipeline", "BriaFibo2Transformer2DModel",
         {"dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32,
          "injection_layer_ids": (1,), "perceiver_num_layers": 1, "axes_dims": (16, 24, 24),
          "min_num_gist_tokens": 32, "max_num_gist_tokens": 64,
          "gist_step": 8, "gist_min_text_len": 16, "gist_max_text_len": 64}, {},
         inputs={"hidden_states": drawn(1, 32, 32, 32), "encoder_hidden_states": drawn(1, 2, 32, 32),
                 "context_latents": [drawn(1, 32, 16, 16)]}),
    bare("Ideogram4Pipeline", "Ideogram4Transformer2DModel",
         HEADS | {"num_layers": 1, "in_channels": 64, "llm_features_dim": 32, "adaln_dim": 32, "intermediate_size": 64,
                  "mrope_section": (12, 10, 10)}, {},
         inputs={"hidden_states": drawn(1, 288, 64), "encoder_hidden_states": drawn(1, 288, 32),
                 "position_ids": torch.cat([line(32), places(1, 16, 16, 100)])[None],
                 "segment_ids": torch.ones(1, 288, dtype=torch.long),
                 "indicator": torch.tensor([[3] * 32 + [2] * 256])}),
    bare("GlmImagePipeline", "GlmImageTransformer2DModel",
         HEADS | {"num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 32, "condition_dim": 16,
                  "prior_vq_quantizer_codebook_size": 64}, {},
         inputs={"hidden_states": drawn(1, 16, 32, 32), "encoder_hidden_states": drawn(1, 32, 32),
                 "prior_token_id": torch.arange(256)[None] % 64,
                 "prior_token_drop": torch.zeros(1, 256, dtype=torch.bool),
                 "target_size": torch.tensor([[256.0, 256.0]]), "crop_coords": torch.zeros(1, 2)}),
    bare("JoyImageEditPipeline", "JoyImageEditTransformer3DModel", JOY, {},
         inputs={"hidden_states": drawn(1, 2, 16, 1, 32, 32), "encoder_hidden_states": drawn(1, 32, 32)}),
    bare("JoyImageEditPlusPipeline", "JoyImageEditPlusTransformer3DModel", JOY, {},
         inputs={"hidden_states": drawn(1, 320, 16, 1, 2, 2), "encoder_hidden_states": drawn(1, 32, 32),
                 "encoder_hidden_states_mask": mask(), "shape_list": [[(1, 16, 16), (1, 8, 8)]]}),
    bare("Kandinsky6TI2VAPipeline", "Kandinsky6Transformer3DModel",
         KANDINSKY | {"in_audio_dim": 8, "out_audio_dim": 8, "model_dim_a": 64, "time_dim_a": 16, "ff_dim_a": 32,
                      "axes_dims_a": (16, 24, 24), "visual_cond": True}, {},
         inputs={"hidden_states": drawn(1, 3, 16, 24, 33), "encoder_hidden_states": drawn(1, 32, 32),
                 "pooled_projections": drawn(1, 32), "audio_hidden_states": drawn(1, 40, 8)}),
    bare("Flux3ModularPipeline", "Flux3Transformer2DModel", FLUX2 | {"cond_in_channels": 64}, {},
         inputs={"hidden_states": drawn(1, 256, 64), "encoder_hidden_states": drawn(1, 32, 32),
                 "img_ids": four(places(1, 16, 16)), "txt_ids": four(line(32)),
                 "image_cond_hidden_states": drawn(1, 64, 64), "image_cond_ids": four(places(1, 8, 8, 10))}),
    bare("MiniMaxH3ModularPipeline", "MiniMaxH3Transformer3DModel",
         HEADS | {"hidden_size": 128, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4,
                  "audio_in_channels": 8, "text_dim": 32, "freq_dim": 32, "time_embed_hidden_dim": 64,
                  "time_embed_dim": 32, "rope_freq_dim": 8}, {},
         inputs={"hidden_states": drawn(1, 288, 16), "audio_hidden_states": drawn(1, 20, 8),
                 "encoder_hidden_states": drawn(1, 32, 32), "timestep_indices": torch.zeros(340, dtype=torch.long),
                 "token_tags": torch.tensor([1] * 32 + [2] * 20 + [0] * 288),
                 "position_ids": torch.cat([line(32), line(20, 32), places(3, 8, 12) + torch.tensor([32, 0, 0])]),
                 "video_indices": torch.arange(52, 340), "audio_indices": torch.arange(32, 52),
                 "text_indices": torch.arange(32)}),
    bare("HunyuanVideoFramepackPipeline", "HunyuanVideoFramepackTransformer3DModel",
         HEADS | PAIR | {"num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32,
                         "image_proj_dim": 32, "rope_axes_dim": (16, 24, 24), "has_image_proj": True,
                         "has_clean_x_embedder": True}, {},
         inputs={"hidden_states": drawn(1, 16, 3, 16, 24), "encoder_hidden_states": drawn(1, 32, 32),
                 "encoder_attention_mask": mask(), "pooled_projections": drawn(1, 32), "image_embeds": drawn(1, 16, 32),
                 "guidance": torch.tensor([1000.0]), "indices_latents": torch.arange(3) + 4,
                 "latents_clean": drawn(1, 16, 2, 16, 24), "indices_latents_clean": torch.arange(2),
                 "latents_history_2x": drawn(1, 16, 2, 16, 24), "indices_latents_history_2x": torch.arange(2),
                 "latents_history_4x": drawn(1, 16, 4, 16, 24), "indices_latents_history_4x": torch.arange(4)}),
    bare("WanAnimatePipeline", "WanAnimateTransformer3DModel",
         WAN | {"in_channels": 36, "latent_channels": 16, "image_dim": 32, "inject_face_latents_blocks": 1,
                "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
                "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
                "face_encoder_num_heads": 2}, {},
         inputs={"hidden_states": drawn(1, 36, 4, 16, 24), "encoder_hidden_states": drawn(1, 32, 32),
                 "encoder_hidden_states_image": drawn(1, 16, 32), "pose_hidden_states": drawn(1, 16, 3, 16, 24),
                 "face_pixel_values": drawn(1, 3, 9, 16, 16)}),
    bare("ConsisIDPipeline", "ConsisIDTransformer3DModel",
         HEADS | {"num_layers": 1, "text_embed_dim": 32, "time_embed_dim": 32, "sample_width": 24, "sample_height": 16,
                  "sample_frames": 9, "max_text_seq_length": 32}, {},
         inputs={"hidden_states": drawn(1, 3, 16, 16, 24), "encoder_hidden_states": drawn(1, 32, 32)}),
)  # fmt: skip
