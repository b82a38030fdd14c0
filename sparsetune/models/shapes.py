"""Building of published models without their weights, and measuring of their size."""

from types import SimpleNamespace
from typing import Any

import torch

from sparsetune.attention.ordering import Grid
from sparsetune.config import GenerationConfig
from sparsetune.models.calls import patch_of
from sparsetune.models.families import family_named, transformer_site
from sparsetune.models.family import Family
from sparsetune.models.model_shape import ModelShape
from sparsetune.models.random_weights import Blueprint, build_component


def shape_of(plan: Blueprint, settings: GenerationConfig) -> ModelShape:
    """Build a model on the meta device, which takes no memory, and measure it for the settings' frames and size."""
    with torch.device("meta"):
        module = build_component(plan, "transformer", "full")
        vae = build_component(plan, "vae", "full")
    family = family_named(plan.pipeline, type(module).__name__)
    site = transformer_site(family, "transformer", module)
    layer = site.layers[0]
    num_transformers = sum(name in plan.components for name in family.transformers)
    return ModelShape(
        num_layers=num_transformers * len(site.layers),
        num_heads=layer.num_heads,
        head_dim=layer.head_dim,
        num_transformers=num_transformers,
        num_parameters=num_transformers * _count(module),
        vae_parameters=_count(vae),
        grid=_grid(plan, family, patch_of(module), settings),
        num_text_tokens=plan.tokens["text"],
    )


def _grid(plan: Blueprint, family: Family, patch: Grid, settings: GenerationConfig) -> Grid:
    frames = 1 if family.is_image else -(-settings.num_frames // plan.tokens["temporal"])
    side = plan.tokens["spatial"]
    return -(-frames // patch[0]), settings.height // side // patch[1], settings.width // side // patch[2]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta_pipeline(plan: Blueprint) -> Any:
    """Build a model's transformers at full size on the meta device, in a bare pipeline."""
    with torch.device("meta"):
        parts = {name: build_component(plan, name, "full") for name in plan.components if "transformer" in name}
    return type(plan.pipeline, (SimpleNamespace,), {})(**parts, scheduler=None)
