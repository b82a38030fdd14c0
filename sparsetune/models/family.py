"""A family of diffusers models whose transformers are alike, described by data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsetune.attention.sites import ReadCall, TextPlace
from sparsetune.models import calls


@dataclass(frozen=True)
class LayerRule:
    path: str  # full match of the modules' paths within the transformer
    # Position of text tokens in q, k and v (joint attention), and of others that aren't the video's own, e.g. audio
    text: TextPlace | None = None


@dataclass(frozen=True)
class Family:
    name: str  # its result files start with it
    transformer_class: str  # in diffusers
    layers: tuple[LayerRule, ...]  # its self-attention modules
    read_call: ReadCall = calls.latents_call
    frame_unit: int = 4  # the number of frames is a multiple of this plus `first_frames`; 0 for images
    first_frames: int = 1
    transformers: tuple[str, ...] = ("transformer",)  # the pipeline's attributes, in the order in which they run
    # The transformer's timestep argument at each step; None where the scheduler's own count says which step runs
    steps: Callable[[Any], Sequence[float]] | None = calls.timesteps
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
