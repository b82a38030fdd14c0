"""Size of a published model: layers, tokens, weights, and attention's share of its arithmetic."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sparsetune.attention.ordering import Grid
from sparsetune.attention.sites import TransformerSite
from sparsetune.config import GenerationConfig
from sparsetune.models.calls import patch_of
from sparsetune.models.families import Family, family_named, transformer_site
from sparsetune.models.random_weights import Blueprint, build_component


@dataclass(frozen=True)
class ModelShape:
    """A model at its published size.

    Args:
        num_layers: self-attention layers of all transformers.
        num_heads, head_dim: of a layer.
        num_transformers: transformers; a step runs one of them.
        num_parameters: of all transformers.
        vae_parameters: of the VAE.
        grid: latent frames, height and width in tokens.
        num_text_tokens: text tokens in the joint attention, at most.
        attention_share: fraction in [0, 1] of a transformer call's arithmetic that is attention: 4 N² d in every layer,
            against 2 N for each parameter. Other work (norms, the VAE, text encoders) isn't counted.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_transformers: int
    num_parameters: int
    vae_parameters: int
    grid: Grid
    num_text_tokens: int
    attention_share: float

    @property
    def num_tokens(self) -> int:
        """Tokens of a self-attention call."""
        frames, height, width = self.grid
        return frames * height * width + self.num_text_tokens

    @property
    def transformer_gb(self) -> float:
        """Size of all transformers' weights in bfloat16, in 10^9 bytes."""
        return 2 * self.num_parameters / 1e9

    @property
    def vae_gb(self) -> float:
        """Size of the VAE's weights in bfloat16, in 10^9 bytes."""
        return 2 * self.vae_parameters / 1e9


def shape_of(plan: Blueprint, settings: GenerationConfig) -> ModelShape:
    """Build a model on the meta device, which takes no memory, and measure it.

    `settings` has the frames, height and width for the number of tokens.
    """
    with torch.device("meta"):
        module = build_component(plan, "transformer", "full")
        vae = build_component(plan, "vae", "full")
    family = family_named(plan.pipeline, type(module).__name__)
    site = transformer_site(family, "transformer", module)
    layer = site.layers[0]
    grid = _grid(plan, family, patch_of(module), settings)
    num_transformers = sum(name in plan.components for name in family.transformers)
    parameters = _count(module)
    tokens = grid[0] * grid[1] * grid[2] + plan.tokens["text"]
    return ModelShape(
        num_layers=num_transformers * len(site.layers),
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        num_transformers=num_transformers,
        num_parameters=num_transformers * parameters,
        vae_parameters=_count(vae),
        grid=grid,
        num_text_tokens=plan.tokens["text"],
        attention_share=_share(site, tokens, parameters),
    )


def _share(site: TransformerSite, tokens: int, parameters: int) -> float:
    attention = sum(4 * tokens**2 * layer.num_heads * layer.head_dim for layer in site.layers)
    return attention / (attention + 2 * tokens * parameters)


def _grid(plan: Blueprint, family: Family, patch: Grid, settings: GenerationConfig) -> Grid:
    frames = 1 if family.is_image else -(-settings.num_frames // plan.tokens["temporal"])
    side = plan.tokens["spatial"]
    return -(-frames // patch[0]), settings.height // side // patch[1], settings.width // side // patch[2]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_pipeline(plan: Blueprint) -> Any:
    """Build a model's transformers at full size on the meta device, which takes no memory, in a bare pipeline."""
    with torch.device("meta"):
        parts = {name: build_component(plan, name, "full") for name in plan.components if "transformer" in name}
    return type(plan.pipeline, (SimpleNamespace,), {})(**parts, scheduler=None)
