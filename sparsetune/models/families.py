"""Supported families of diffusers models, as data, and their self-attention modules."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsetune.attention.sites import AttentionSites, LayerSite, ReadCall, TextPlace, TransformerSite
from sparsetune.errors import ModelError
from sparsetune.models import calls
from sparsetune.models.dense_kernel import dense_kernel
from sparsetune.models.step_caching import DiffusersCaching


@dataclass(frozen=True)
class LayerRule:
    path: str  # full match of the modules' paths within the transformer
    text: TextPlace | None = None  # position of text tokens in q, k and v (joint attention)


@dataclass(frozen=True)
class Family:
    name: str  # its result files start with it
    transformer_class: str  # in diffusers
    layers: tuple[LayerRule, ...]  # its self-attention modules
    read_call: ReadCall = calls.video_call
    frame_unit: int = 4  # the number of frames is a multiple of this plus `first_frames`; 0 for images
    first_frames: int = 1
    transformers: tuple[str, ...] = ("transformer",)  # the pipeline's attributes, in the order in which they run
    steps: Callable[[Any], Sequence[float]] = calls.timesteps  # the transformer's timestep argument at each step
    pipelines: str = ".*"  # full match of the class, where families share a transformer class
    packing: int = 1  # latent pixels in a token's side where the pipeline packs them rather than the transformer
    # The pipeline's argument for the guidance scale; `guider` where a component has it.
    guidance: Literal["guidance_scale", "true_cfg_scale", "guider"] = "guidance_scale"
    no_negative: str | None = None  # the default negative prompt; None leaves that to the pipeline
    from_image: str = ""  # full match of a class that needs an image, unlike its signature
    tiled_vae: bool = False  # the VAE only works in tiles
    # Module paths in the model's own code, which SpargeAttn's checkpoints are saved from, and diffusers' path for each.
    upstream: tuple[tuple[str, str], ...] = ()

    @property
    def is_image(self) -> bool:
        return self.frame_unit == 0


_BLOCKS_ATTN1 = (LayerRule(r"blocks\.\d+\.attn1"),)
_TRANSFORMER_BLOCKS_ATTN1 = (LayerRule(r"transformer_blocks\.\d+\.attn1"),)
_DOUBLE_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"

_WAN_UPSTREAM = ((r"blocks\.(\d+)\.self_attn", r"blocks.\1.attn1"),)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="cogvideo",
        transformer_class="CogVideoXTransformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "start"),),
        read_call=calls.frames_first_call,
        # Its VAE decodes a latent frame to 4 frames, and drops one of the first only where their number is odd.
        frame_unit=8,
    ),
    Family(
        name="wan",
        transformer_class="WanTransformer3DModel",
        layers=_BLOCKS_ATTN1,
        transformers=("transformer", "transformer_2"),
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="wan-vace",
        transformer_class="WanVACETransformer3DModel",
        layers=(LayerRule(r"(vace_)?blocks\.\d+\.attn1"),),
        transformers=("transformer", "transformer_2"),
    ),
    Family(
        name="hunyuan-video",
        transformer_class="HunyuanVideoTransformer3DModel",
        layers=(LayerRule(_DOUBLE_AND_SINGLE, "end"),),
    ),
    Family(
        name="hunyuan-video-1.5",
        transformer_class="HunyuanVideo15Transformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "end"),),
        guidance="guider",
    ),
    Family(
        name="ltx",
        transformer_class="LTXVideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(  # the audio's own attention has too few tokens for sparsity to help
        name="ltx2",
        transformer_class="LTX2VideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(
        name="mochi",
        transformer_class="MochiTransformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "end"),),
        frame_unit=6,
    ),
    Family(
        name="allegro",
        transformer_class="AllegroTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        first_frames=0,
        tiled_vae=True,
    ),
    Family(
        name="easyanimate",
        transformer_class="EasyAnimateTransformer3DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn1", "start"),),
        no_negative="",
    ),
    Family(
        name="skyreels-v2",
        transformer_class="SkyReelsV2Transformer3DModel",
        layers=_BLOCKS_ATTN1,
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="cosmos-2.5",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        steps=calls.sigmas,
        pipelines="Cosmos2_5_.*",
    ),
    Family(
        name="cosmos-2-image",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        frame_unit=0,
        steps=calls.sigma_ratios,
        pipelines="Cosmos2TextToImagePipeline",
    ),
    Family(
        name="cosmos-2",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        steps=calls.sigma_ratios,
        pipelines="Cosmos2.*",
        from_image="Cosmos2VideoToWorldPipeline",
    ),
    Family(
        name="cosmos",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        frame_unit=8,
        from_image="CosmosVideoToWorldPipeline",
    ),
    Family(
        name="flux",
        transformer_class="FluxTransformer2DModel",
        layers=(LayerRule(_DOUBLE_AND_SINGLE, "start"),),
        read_call=calls.positioned_call,
        frame_unit=0,
        steps=calls.flow_times,
        packing=2,
    ),
    Family(
        name="sd3",
        transformer_class="SD3Transformer2DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "end"), LayerRule(r"transformer_blocks\.\d+\.attn2")),
        read_call=calls.image_call,
        frame_unit=0,
    ),
    Family(
        name="qwen-image",
        transformer_class="QwenImageTransformer2DModel",
        layers=(LayerRule(r"transformer_blocks\.\d+\.attn", "start"),),
        read_call=calls.shaped_call,
        frame_unit=0,
        steps=calls.flow_times,
        guidance="true_cfg_scale",
        no_negative=" ",  # its authors' default: without one there is no guidance
    ),
)


def family_of(pipe: Any) -> Family:
    """Find a pipeline's family; ModelError where it isn't known here."""
    return family_named(type(pipe).__name__, type(main_transformer(pipe)).__name__)


def family_named(pipeline: str, transformer: str) -> Family:
    """Find a family by the classes of a pipeline and of its transformer; ModelError where it isn't known here."""
    for family in FAMILIES:
        if family.transformer_class == transformer and re.fullmatch(family.pipelines, pipeline):
            return family
    known = ", ".join(dict.fromkeys(family.transformer_class for family in FAMILIES))
    raise ModelError(f"{pipeline} with transformer {transformer} is not supported; supported transformers are {known}")


def main_transformer(pipe: Any) -> Any:
    """Return the transformer that runs first, without a `torch.compile` wrapper; None where there is none."""
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        if module is not None:
            return getattr(module, "_orig_mod", module)
    return None


def attention_sites(pipe: Any) -> AttentionSites:
    """Find a pipeline's self-attention modules; ModelError where the family is unknown, or no module matches."""
    family = family_of(pipe)
    transformers = tuple(
        transformer_site(family, name, getattr(module, "_orig_mod", module))
        for name in family.transformers
        if (module := getattr(pipe, name, None)) is not None
    )
    if not any(transformer.layers for transformer in transformers):
        raise ModelError(
            f"found no self-attention modules in {type(pipe).__name__}; use a model as diffusers builds it"
        )
    return AttentionSites(
        transformers,
        _Steps(pipe, family.steps),
        lambda: getattr(pipe.scheduler, "step_index", None),
        DiffusersCaching([getattr(pipe, transformer.name) for transformer in transformers]),
    )


class _Steps:
    """The timestep argument of each denoising step; copied from the GPU once a generation."""

    def __init__(self, pipe: Any, read: Callable[[Any], Sequence[float]]) -> None:
        self._pipe = pipe
        self._read = read
        self._timesteps: torch.Tensor | None = None
        self._values: Sequence[float] = ()

    def __call__(self) -> Sequence[float]:
        scheduler = self._pipe.scheduler
        if scheduler.timesteps is None:
            return ()
        if self._timesteps is not scheduler.timesteps:
            self._timesteps, self._values = scheduler.timesteps, self._read(scheduler)
        return self._values


def transformer_site(family: Family, name: str, module: nn.Module) -> TransformerSite:
    layers = []
    for path, layer in module.named_modules():
        rule = next((rule for rule in family.layers if re.fullmatch(rule.path, path)), None)
        heads, width = getattr(layer, "heads", None), getattr(layer, "inner_dim", None)
        if rule is not None and isinstance(heads, int) and isinstance(width, int):
            layers.append(LayerSite(f"{name}.{path}", layer, heads, width // heads, rule.text, dense_kernel(layer)))
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return TransformerSite(name, module, tuple(layers), family.read_call, arguments)
