"""What differs from one family of diffusers models to the next, as data."""

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


@dataclass(frozen=True)
class LayerRule:
    """Which modules are self-attention: those whose path within the transformer matches whole.

    `text` is where text tokens lie in their q, k and v (joint attention); None where there are none.
    """

    path: re.Pattern[str]
    text: TextPlace | None = None


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: stem of its result files, e.g. `cogvideo`.
        transformer_class: class name of its transformer in diffusers.
        layers: its self-attention modules.
        read_call: reads timestep and tokens off a call of the transformer.
        frame_unit: a video has a multiple of so many frames, plus `first_frames`; 0 for images.
        first_frames: see `frame_unit`.
        transformers: the pipeline's attributes that hold one, in the order in which they run.
        steps: what the transformer is called with at each step of the scheduler.
        pipelines: full match of the pipeline's class, where the family is only some of those with this transformer.
        packing: latent pixels in a token's side where the pipeline packs them rather than the transformer.
        guidance: the pipeline's argument that takes the guidance scale; `guider` where a component of it does.
        no_negative: what is given where there is no negative prompt; None leaves that to the pipeline, which may have
            one of its own.
        from_image: full match of the pipeline's class, where an image is needed though its signature doesn't say so.
        tiled_vae: whether its VAE can only work in tiles.
        upstream: module paths in the model's own code, which SpargeAttn's checkpoints are saved from, and the path in
            diffusers that stands for each.
    """

    name: str
    transformer_class: str
    layers: tuple[LayerRule, ...]
    read_call: ReadCall
    frame_unit: int
    first_frames: int = 1
    transformers: tuple[str, ...] = ("transformer",)
    steps: Callable[[Any], Sequence[float]] = calls.timesteps
    pipelines: re.Pattern[str] = re.compile(".*")
    packing: int = 1
    guidance: Literal["guidance_scale", "true_cfg_scale", "guider"] = "guidance_scale"
    no_negative: str | None = None
    from_image: re.Pattern[str] = re.compile("")
    tiled_vae: bool = False
    upstream: tuple[tuple[re.Pattern[str], str], ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether it makes still images."""
        return self.frame_unit == 0


def _rule(path: str, text: TextPlace | None = None) -> LayerRule:
    return LayerRule(re.compile(path), text)


_BLOCKS_ATTN1 = (_rule(r"blocks\.\d+\.attn1"),)
_TRANSFORMER_BLOCKS_ATTN1 = (_rule(r"transformer_blocks\.\d+\.attn1"),)
_DOUBLE_AND_SINGLE = r"(single_)?transformer_blocks\.\d+\.attn"

_WAN_UPSTREAM = ((re.compile(r"blocks\.(\d+)\.self_attn"), r"blocks.\1.attn1"),)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="cogvideo",
        transformer_class="CogVideoXTransformer3DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn1", "start"),),
        read_call=calls.frames_first_call,
        # Its VAE makes 4 frames of a latent frame, and one frame less of the first only where their number is odd.
        frame_unit=8,
    ),
    Family(
        name="wan",
        transformer_class="WanTransformer3DModel",
        layers=_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=4,
        transformers=("transformer", "transformer_2"),
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="wan-vace",
        transformer_class="WanVACETransformer3DModel",
        layers=(_rule(r"(vace_)?blocks\.\d+\.attn1"),),
        read_call=calls.video_call,
        frame_unit=4,
        transformers=("transformer", "transformer_2"),
    ),
    Family(
        name="hunyuan-video",
        transformer_class="HunyuanVideoTransformer3DModel",
        layers=(_rule(_DOUBLE_AND_SINGLE, "end"),),
        read_call=calls.video_call,
        frame_unit=4,
    ),
    Family(
        name="hunyuan-video-1.5",
        transformer_class="HunyuanVideo15Transformer3DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn", "end"),),
        read_call=calls.video_call,
        frame_unit=4,
        guidance="guider",
    ),
    Family(
        name="ltx",
        transformer_class="LTXVideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(  # the audio's own attention has too few tokens to gain by sparsity
        name="ltx2",
        transformer_class="LTX2VideoTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.packed_video_call,
        frame_unit=8,
    ),
    Family(
        name="mochi",
        transformer_class="MochiTransformer3DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn1", "end"),),
        read_call=calls.video_call,
        frame_unit=6,
    ),
    Family(
        name="allegro",
        transformer_class="AllegroTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=4,
        first_frames=0,
        tiled_vae=True,
    ),
    Family(
        name="easyanimate",
        transformer_class="EasyAnimateTransformer3DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn1", "start"),),
        read_call=calls.video_call,
        frame_unit=4,
        no_negative="",
    ),
    Family(
        name="skyreels-v2",
        transformer_class="SkyReelsV2Transformer3DModel",
        layers=_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=4,
        upstream=_WAN_UPSTREAM,
    ),
    Family(
        name="cosmos-2.5",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=4,
        steps=calls.sigmas,
        pipelines=re.compile("Cosmos2_5_.*"),
    ),
    Family(
        name="cosmos-2-image",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=0,
        steps=calls.sigma_ratios,
        pipelines=re.compile("Cosmos2TextToImagePipeline"),
    ),
    Family(
        name="cosmos-2",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=4,
        steps=calls.sigma_ratios,
        pipelines=re.compile("Cosmos2.*"),
        from_image=re.compile("Cosmos2VideoToWorldPipeline"),
    ),
    Family(
        name="cosmos",
        transformer_class="CosmosTransformer3DModel",
        layers=_TRANSFORMER_BLOCKS_ATTN1,
        read_call=calls.video_call,
        frame_unit=8,
        from_image=re.compile("CosmosVideoToWorldPipeline"),
    ),
    Family(
        name="flux",
        transformer_class="FluxTransformer2DModel",
        layers=(_rule(_DOUBLE_AND_SINGLE, "start"),),
        read_call=calls.positioned_call,
        frame_unit=0,
        steps=calls.flow_times,
        packing=2,
    ),
    Family(
        name="sd3",
        transformer_class="SD3Transformer2DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn", "end"), _rule(r"transformer_blocks\.\d+\.attn2")),
        read_call=calls.image_call,
        frame_unit=0,
    ),
    Family(
        name="qwen-image",
        transformer_class="QwenImageTransformer2DModel",
        layers=(_rule(r"transformer_blocks\.\d+\.attn", "start"),),
        read_call=calls.shaped_call,
        frame_unit=0,
        steps=calls.flow_times,
        guidance="true_cfg_scale",
        no_negative=" ",  # as its authors do: without one there is no guidance
    ),
)


def family_of(pipe: Any) -> Family:
    """Find the family of a pipeline by its transformer's class, and its own where families share a transformer.

    Raises:
        ModelError: there is no transformer, or its class isn't known here.
    """
    return family_named(type(pipe).__name__, type(main_transformer(pipe)).__name__)


def family_named(pipeline: str, transformer: str) -> Family:
    """Find a family by the classes of a pipeline and of its transformer.

    Raises:
        ModelError: it isn't known here.
    """
    for family in FAMILIES:
        if family.transformer_class == transformer and family.pipelines.fullmatch(pipeline):
            return family
    known = ", ".join(dict.fromkeys(family.transformer_class for family in FAMILIES))
    raise ModelError(
        f"the pipeline's transformer must be one of {known}, but {pipeline} has {transformer}; "
        "use a model of a supported family"
    )


def main_transformer(pipe: Any) -> Any:
    """Give the transformer that runs first, as it is without `torch.compile`; None where there is none."""
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        if module is not None:
            return getattr(module, "_orig_mod", module)
    return None


def attention_sites(pipe: Any) -> AttentionSites:
    """Find a pipeline's self-attention modules.

    Raises:
        ModelError: the family is unknown, or no module matches.
    """
    family = family_of(pipe)
    held = [(name, getattr(pipe, name, None)) for name in family.transformers]
    transformers = tuple(
        transformer_site(family, name, getattr(module, "_orig_mod", module))
        for name, module in held
        if module is not None
    )
    if not any(transformer.layers for transformer in transformers):
        raise ModelError(
            f"{type(pipe).__name__} must have self-attention modules to make sparse, but none was found in it; "
            "use a model of a supported family as diffusers builds it"
        )
    return AttentionSites(transformers, _Steps(pipe, family.steps), lambda: getattr(pipe.scheduler, "step_index", None))


class _Steps:
    """What a pipeline's transformers are called with at each step; read off a GPU once a generation."""

    def __init__(self, pipe: Any, read: Callable[[Any], Sequence[float]]) -> None:
        self._pipe = pipe
        self._read = read
        self._of: torch.Tensor | None = None
        self._values: Sequence[float] = ()

    def __call__(self) -> Sequence[float]:
        scheduler = self._pipe.scheduler
        if scheduler.timesteps is None:
            return ()
        if self._of is not scheduler.timesteps:
            self._of, self._values = scheduler.timesteps, self._read(scheduler)
        return self._values


def transformer_site(family: Family, name: str, module: nn.Module) -> TransformerSite:
    """Find the self-attention modules of one transformer."""
    layers = []
    for path, layer in module.named_modules():
        rule = next((rule for rule in family.layers if rule.path.fullmatch(path)), None)
        heads, width = getattr(layer, "heads", None), getattr(layer, "inner_dim", None)
        if rule is not None and isinstance(heads, int) and isinstance(width, int):
            layers.append(LayerSite(f"{name}.{path}", layer, heads, width // heads, rule.text, dense_kernel(layer)))
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return TransformerSite(name, module, tuple(layers), family.read_call, arguments)
