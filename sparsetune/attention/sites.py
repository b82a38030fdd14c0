"""Where a pipeline's self-attention happens; what `sparsify` needs to know of a model, and all it knows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetune.attention.ordering import TokenLayout


@dataclass(frozen=True)
class LayerSite:
    """One self-attention module.

    Args:
        name: its path from the pipeline, e.g. `transformer.transformer_blocks.0.attn1`.
        module: the module whose forward makes the attention call.
        num_heads: attention heads.
        head_dim: channels a head.
    """

    name: str
    module: nn.Module
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class TransformerCall:
    """What one call of a transformer says about itself: the timestep's value and where its tokens lie."""

    timestep: float
    layout: TokenLayout


ReadCall = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], TransformerCall]
"""Reads a `TransformerCall` off a transformer's positional and keyword arguments."""


@dataclass(frozen=True)
class TransformerSite:
    """One transformer of a pipeline with its self-attention layers, in the order in which they run."""

    name: str
    module: nn.Module
    layers: tuple[LayerSite, ...]
    read_call: ReadCall


@dataclass(frozen=True)
class AttentionSites:
    """All transformers of a pipeline, and the scheduler's timesteps in the order in which they are run.

    `timesteps` is asked at every transformer call, since a pipeline sets them when it starts.
    """

    transformers: tuple[TransformerSite, ...]
    timesteps: Callable[[], Sequence[float]]

    @property
    def layers(self) -> tuple[LayerSite, ...]:
        """Every self-attention layer."""
        return tuple(layer for transformer in self.transformers for layer in transformer.layers)
