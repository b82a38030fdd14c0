"""What differs from one family of diffusers models to the next, as data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsetune.attention.ordering import TokenLayout
from sparsetune.attention.sites import AttentionSites, LayerSite, ReadCall, TransformerCall, TransformerSite
from sparsetune.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: stem of its result files, e.g. `cogvideo`.
        transformer_class: class name of its transformer in diffusers.
        transformers: the pipeline's attributes that hold one, in the order in which they run.
        self_attention: full match of a self-attention module's path within the transformer.
        read_call: reads timestep and token layout off a call of the transformer.
        frame_unit: a video has a multiple of so many frames, plus 1.
    """

    name: str
    transformer_class: str
    transformers: tuple[str, ...]
    self_attention: re.Pattern[str]
    read_call: ReadCall
    frame_unit: int


def _read_cogvideox_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TransformerCall:
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    _, frames, _, height, width = given["hidden_states"].shape
    config: Any = module.config
    patch_t = config.patch_size_t or 1
    grid = (-(-frames // patch_t), height // config.patch_size, width // config.patch_size)
    num_text = given["encoder_hidden_states"].shape[1]
    return TransformerCall(_timestep(given["timestep"]), TokenLayout(grid, range(num_text)))


def _timestep(value: Any) -> float:
    return float(value.flatten()[0]) if isinstance(value, torch.Tensor) else float(value)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="cogvideo",
        transformer_class="CogVideoXTransformer3DModel",
        transformers=("transformer",),
        self_attention=re.compile(r"transformer_blocks\.\d+\.attn1"),
        read_call=_read_cogvideox_call,
        # Its VAE makes 4 frames of a latent frame, and one frame less of the first only where their number is odd.
        frame_unit=8,
    ),
)


def family_of(pipe: Any) -> Family:
    """Find the family of a pipeline by its transformer's class.

    Raises:
        ModelError: there is no transformer, or its class isn't known here.
    """
    found = type(getattr(pipe, "transformer", None)).__name__
    for family in FAMILIES:
        if family.transformer_class == found:
            return family
    known = ", ".join(family.transformer_class for family in FAMILIES)
    raise ModelError(
        f"the pipeline's transformer must be one of {known}, but {type(pipe).__name__} has {found}; "
        "use a model of a supported family"
    )


def attention_sites(pipe: Any) -> AttentionSites:
    """Find a pipeline's self-attention modules.

    Raises:
        ModelError: the family is unknown, or no module matches.
    """
    family = family_of(pipe)
    transformers = tuple(_transformer_site(family, name, getattr(pipe, name)) for name in family.transformers)
    if not any(transformer.layers for transformer in transformers):
        raise ModelError(f"{type(pipe).__name__} must have self-attention modules, but none was found in it")

    def timesteps() -> list[float]:
        values = pipe.scheduler.timesteps
        return [] if values is None else [float(value) for value in values.tolist()]

    return AttentionSites(transformers, timesteps)


def _transformer_site(family: Family, name: str, module: nn.Module) -> TransformerSite:
    layers = tuple(
        LayerSite(f"{name}.{path}", layer, int(layer.heads), int(layer.inner_dim) // int(layer.heads))
        for path, layer in module.named_modules()
        if family.self_attention.fullmatch(path) and isinstance(layer.heads, int) and isinstance(layer.inner_dim, int)
    )
    return TransformerSite(name, module, layers, family.read_call)
