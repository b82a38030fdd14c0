"""The pipeline classes of the support table: their components and call arguments."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from sparsetune.models.random_weights import blueprint, build_component


@dataclass(frozen=True)
class Case:
    """A pipeline class, its components, and its call arguments besides the prompt.

    `transformer` changes the tiny transformer's configuration; `parts` builds what the blueprint lacks; `enlarging`
    names the functions that would enlarge its images.
    """

    pipeline: str
    blueprint: str
    arguments: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[Any], dict[str, Any]] = lambda made: {}
    enlarging: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.pipeline}-{self.blueprint}"


def image(width: int = 192, height: int = 128) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across % 256, down % 256, (across + down) % 256], -1).astype(np.uint8))


def clip(num_frames: int = 9) -> list[Image.Image]:
    return [image().rotate(5 * frame) for frame in range(num_frames)]


def clip_encoder(made: Any) -> dict[str, Any]:
    """An encoder of the first frame."""
    plan = blueprint("wan2.1-i2v-14b")
    return {name: build_component(plan, name, "tiny") for name in ("image_encoder", "image_processor")}


def siglip_encoder(made: Any) -> dict[str, Any]:
    """Another image encoder."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=384, patch_size=14))
    return {
        "image_encoder": encoder.eval(),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    }


def controlnet(kind: str) -> Callable[[Any], dict[str, Any]]:
    """A ControlNet of the transformer's shape, without zero weights."""

    def build(made: Any) -> dict[str, Any]:
        found = getattr(diffusers, kind)
        takes = inspect.signature(found.__init__).parameters
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = found(**{name: value for name, value in made.transformer.config.items() if name in takes})
            for weight in net.parameters():
                if not weight.any():
                    torch.nn.init.normal_(weight, std=0.02)
        return {"controlnet": net.eval()}

    return build


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


VIDEO = {"height": 128, "width": 192, "num_frames": 9}
STILL = {"height": 256, "width": 256}
SHORT = {"max_sequence_length": 32}
TEXT = {"prompt": None, "negative_prompt": None, "prompt_embeds": drawn(1, 40, 32)}
"""In place of a prompt, where a vision-language model would read it."""
INPAINT = STILL | {"image": image(256, 256), "mask_image": image(256, 256).convert("L"), "strength": 1.0}
CASES = (
    Case("CogVideoXPipeline", "cogvideox-2b", VIDEO | {"max_sequence_length": 32}),
    Case("CogVideoXPipeline", "cogvideox-5b", VIDEO | {"max_sequence_length": 32}),
    Case("CogVideoXPipeline", "cogvideox-1.5-5b", VIDEO | {"num_frames": 13, "max_sequence_length": 32}),
    Case("CogVideoXImageToVideoPipeline", "cogvideox-5b-i2v", VIDEO | {"image": image(), "max_sequence_length": 32}),
    Case(
        "CogVideoXImageToVideoPipeline",
        "cogvideox-1.5-5b-i2v",
        VIDEO | {"num_frames": 13, "image": image(), "max_sequence_length": 32},
    ),
    Case(
        "CogVideoXVideoToVideoPipeline",
        "cogvideox-5b",
        {"height": 128, "width": 192, "video": clip(), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case(
        "CogVideoXFunControlPipeline",
        "cogvideox-2b",
        {"height": 128, "width": 192, "control_video": clip()} | SHORT,
        {"in_channels": 32},
    ),
    Case("WanPipeline", "wan2.1-t2v-1.3b", VIDEO),
    Case("WanPipeline", "wan2.1-t2v-14b", VIDEO),
    Case("WanPipeline", "wan2.2-t2v-a14b", VIDEO),
    Case("WanPipeline", "wan2.2-ti2v-5b", VIDEO | {"height": 256, "width": 384}),
    Case("WanImageToVideoPipeline", "wan2.1-i2v-14b", VIDEO | {"image": image()}),
    Case("WanImageToVideoPipeline", "wan2.2-i2v-a14b", VIDEO | {"image": image()}),
    Case("WanImageToVideoPipeline", "wan2.2-ti2v-5b", VIDEO | {"height": 256, "width": 384, "image": image(384, 256)}),
    Case("WanVideoToVideoPipeline", "wan2.1-t2v-1.3b", {"height": 128, "width": 192, "video": clip(), "strength": 1.0}),
    Case("WanVACEPipeline", "wan2.1-vace-1.3b", VIDEO),
    Case("LucyEditPipeline", "wan2.1-t2v-1.3b", VIDEO | {"video": clip()}, {"in_channels": 32}),
    Case("HunyuanVideoPipeline", "hunyuanvideo", VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}}),
    Case(
        "HunyuanVideoImageToVideoPipeline",
        "hunyuanvideo",
        VIDEO
        | TEXT
        | {"image": image(), "pooled_prompt_embeds": drawn(1, 32), "prompt_attention_mask": torch.ones(1, 40)},
        {"in_channels": 33, "image_condition_type": "latent_concat"},
        lambda made: {"image_processor": None},
    ),
    Case(
        "HunyuanSkyreelsImageToVideoPipeline",
        "hunyuanvideo",
        VIDEO | {"image": image(), "prompt_template": {"template": "{}", "crop_start": 0}},
        {"in_channels": 32},
    ),
    Case("HunyuanVideo15Pipeline", "hunyuanvideo-1.5", {"height": 256, "width": 384, "num_frames": 9}),
    Case(
        "HunyuanVideo15ImageToVideoPipeline",
        "hunyuanvideo-1.5",
        {"image": image(), "num_frames": 5},
        {"task_type": "i2v", "target_size": 128},
        siglip_encoder,
    ),
    Case("LTXPipeline", "ltx-video", {"height": 256, "width": 512, "num_frames": 9}),
    Case(
        "LTXImageToVideoPipeline", "ltx-video", {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256)}
    ),
    Case(
        "LTXConditionPipeline",
        "ltx-video-0.9.5",
        {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256)},
    ),
    Case("LTX2Pipeline", "ltx-2", {"height": 256, "width": 512, "num_frames": 9}),
    Case(
        "LTX2ImageToVideoPipeline",
        "ltx-2",
        {"height": 256, "width": 512, "num_frames": 9, "image": image(512, 256), "image_crf": 0},
    ),
    Case("LTX2ConditionPipeline", "ltx-2", {"height": 256, "width": 512, "num_frames": 9}),
    Case("MochiPipeline", "mochi", VIDEO | {"num_frames": 13}),
    Case("AllegroPipeline", "allegro", VIDEO | {"num_frames": 12}),
    Case("EasyAnimatePipeline", "easyanimate", VIDEO),
    Case("SkyReelsV2Pipeline", "skyreels-v2-t2v-14b", VIDEO),
    Case(
        "SkyReelsV2ImageToVideoPipeline",
        "skyreels-v2-t2v-14b",
        VIDEO | {"image": image()},
        {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 128},
        clip_encoder,
    ),
    Case("SkyReelsV2DiffusionForcingPipeline", "skyreels-v2-df-1.3b", VIDEO | {"base_num_frames": 9}),
    Case(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "skyreels-v2-df-1.3b",
        VIDEO | {"base_num_frames": 9, "image": image()},
    ),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        "skyreels-v2-df-1.3b",
        VIDEO | {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "video": clip()},
    ),
    Case("CosmosTextToWorldPipeline", "cosmos-1-t2w-7b", VIDEO | {"num_frames": 17}),
    Case("CosmosVideoToWorldPipeline", "cosmos-1-v2w-7b", VIDEO | {"num_frames": 17, "image": image()}),
    Case("Cosmos2TextToImagePipeline", "cosmos-2-t2i-2b", STILL),
    Case("Cosmos2VideoToWorldPipeline", "cosmos-2-v2w-2b", VIDEO | {"image": image()}),
    Case("Cosmos2_5_PredictBasePipeline", "cosmos-2.5-2b", VIDEO),
    Case("FluxPipeline", "flux-dev", STILL | {"max_sequence_length": 32}),
    Case(
        "FluxImg2ImgPipeline",
        "flux-dev",
        STILL | {"image": image(256, 256), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case("FluxInpaintPipeline", "flux-dev", INPAINT | {"max_sequence_length": 32}),
    Case(
        "FluxKontextPipeline",
        "flux-dev",
        STILL | {"image": image(256, 256), "max_area": 65536, "_auto_resize": False, "max_sequence_length": 32},
    ),
    Case("FluxKontextInpaintPipeline", "flux-dev", INPAINT | SHORT | {"max_area": 65536, "_auto_resize": False}),
    Case(
        "FluxControlPipeline",
        "flux-dev",
        STILL | SHORT | {"control_image": image(256, 256)},
        {"in_channels": 128, "out_channels": 64},
    ),
    Case(
        "FluxControlImg2ImgPipeline",
        "flux-dev",
        STILL | SHORT | {"control_image": image(256, 256), "image": image(256, 256), "strength": 1.0},
        {"in_channels": 128, "out_channels": 64},
    ),
    Case(
        "FluxControlInpaintPipeline",
        "flux-dev",
        INPAINT | SHORT | {"control_image": image(256, 256)},
        {"in_channels": 128, "out_channels": 64},
    ),
    Case("FluxFillPipeline", "flux-dev", INPAINT | SHORT, {"in_channels": 384, "out_channels": 64}),
    Case(
        "FluxControlNetPipeline",
        "flux-dev",
        STILL | SHORT | {"control_image": image(256, 256)},
        parts=controlnet("FluxControlNetModel"),
    ),
    Case(
        "FluxControlNetImg2ImgPipeline",
        "flux-dev",
        STILL | SHORT | {"control_image": image(256, 256), "image": image(256, 256), "strength": 1.0},
        parts=controlnet("FluxControlNetModel"),
    ),
    Case(
        "FluxControlNetInpaintPipeline",
        "flux-dev",
        INPAINT | SHORT | {"control_image": image(256, 256)},
        parts=controlnet("FluxControlNetModel"),
    ),
    Case("StableDiffusion3Pipeline", "sd3-medium", STILL | {"max_sequence_length": 32}),
    Case(
        "StableDiffusion3Img2ImgPipeline",
        "sd3-medium",
        STILL | {"image": image(256, 256), "strength": 1.0, "max_sequence_length": 32},
    ),
    Case("StableDiffusion3InpaintPipeline", "sd3-medium", INPAINT | {"max_sequence_length": 32}),
    Case("StableDiffusion3PAGPipeline", "sd3-medium", STILL | SHORT),
    Case("QwenImagePipeline", "qwen-image", STILL | {"negative_prompt": "blurred", "true_cfg_scale": 2.0}),
    Case(
        "QwenImageImg2ImgPipeline",
        "qwen-image",
        STILL | {"image": image(256, 256), "strength": 1.0, "negative_prompt": "blurred", "true_cfg_scale": 2.0},
    ),
    Case("QwenImageInpaintPipeline", "qwen-image", INPAINT | {"negative_prompt": "blurred", "true_cfg_scale": 2.0}),
    Case(
        "QwenImageControlNetPipeline",
        "qwen-image",
        STILL | {"control_image": image(256, 256)},
        parts=controlnet("QwenImageControlNetModel"),
    ),
    Case(
        "QwenImageEditPipeline",
        "qwen-image",
        STILL | TEXT | {"image": image(256, 256), "prompt_embeds_mask": torch.ones(1, 40, dtype=torch.long)},
        parts=lambda made: {"processor": None},
        enlarging=("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit.calculate_dimensions",),
    ),
    Case(
        "QwenImageEditInpaintPipeline",
        "qwen-image",
        INPAINT | TEXT | {"prompt_embeds_mask": torch.ones(1, 40, dtype=torch.long)},
        parts=lambda made: {"processor": None},
        enlarging=("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint.calculate_dimensions",),
    ),
)
