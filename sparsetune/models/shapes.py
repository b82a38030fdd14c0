"""Size of a published model: layers, tokens, weights, and attention's share of its arithmetic."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sparsetune.attention.ordering import Grid
from sparsetune.config import GenerationConfig
from sparsetune.models.calls import patch_of
from sparsetune.models.families import family_named, transformer_site
from sparsetune.models.family import Family
from sparsetune.models.random_weights import Blueprint, build_component

_ATTENTION_FLOPS_PER_MS = 4.1e11
"""Of cuDNN's attention in bfloat16 on an H100."""

_SPARSE_START_MS = 1.0
"""Of SpargeAttn's call on an H100: it launches many small kernels, whatever it computes."""


@dataclass(frozen=True)
class ModelShape:
    """A model at its published size; gigabytes are 10^9 bytes of weights in bfloat16."""

    num_layers: int  # self-attention layers of all transformers
    num_heads: int  # of a layer
    head_dim: int
    num_transformers: int  # a step runs one of them
    num_parameters: int  # of all transformers
    vae_parameters: int
    grid: Grid  # latent frames, height and width in tokens
    num_text_tokens: int  # in the joint attention, at most

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid) + self.num_text_tokens

    @property
    def attention_share(self) -> float:
        """Fraction of a transformer call's arithmetic that is attention: 4 N² d in every layer, to 2 N a parameter.

        Other work (norms, the VAE, text encoders) isn't counted.
        """
        attention = 4 * self.num_tokens**2 * self.num_layers * self.num_heads * self.head_dim
        return attention / (attention + 2 * self.num_tokens * self.num_parameters)

    @property
    def sparsity_gain(self) -> str:
        """Whether sparsity can save time at this size, roughly: dense attention against the start of a sparse call.

        Figures of an H100, the sparse call's from before it launched fewer kernels; `tune` measures both here.
        """
        dense_ms = 4 * self.num_tokens**2 * self.num_heads * self.head_dim / _ATTENTION_FLOPS_PER_MS
        verdict = "likely" if dense_ms > 1.5 * _SPARSE_START_MS else "unlikely, too few tokens"
        return (
            f"{verdict} (on an H100 about {dense_ms:.2g} ms of dense attention a layer; a sparse call takes about "
            f"{_SPARSE_START_MS:g} ms whatever its sparsity)"
        )

    @property
    def transformer_gb(self) -> float:
        return 2 * self.num_parameters / 1e9

    @property
    def vae_gb(self) -> float:
        return 2 * self.vae_parameters / 1e9


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
