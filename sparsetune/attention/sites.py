"""The self-attention modules of a pipeline: all that `sparsify` knows of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from sparsetune.attention.ordering import Grid

TextPlace = Literal["start", "end"]


class DenseCall(Protocol):
    """Dense attention over q, k, v of (batch, heads, tokens, head_dim); returns (batch, heads, q tokens, head_dim)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        is_causal: bool,
        scale: float,
        enable_gqa: bool,
    ) -> Tensor: ...


class KernelSwitch(Protocol):
    """A module's choice among dense kernels that don't all pass `scaled_dot_product_attention`."""

    def dense(self) -> DenseCall | None:
        """Return the kernel that is chosen now; None where it is PyTorch's."""
        ...

    def to_native(self) -> Any:
        """Choose PyTorch's; return what `restore` takes."""
        ...

    def restore(self, before: Any) -> None: ...


@dataclass(frozen=True)
class LayerSite:
    """One self-attention module.

    Args:
        name: its path from the pipeline, e.g. `transformer.transformer_blocks.0.attn1`.
        module: the module whose forward makes the attention call.
        num_heads: attention heads.
        head_dim: channels a head.
        text: whether text tokens come before or after all others in q, k and v; None where there are none.
        switch: its choice of a dense kernel; None where it always calls PyTorch's.
    """

    name: str
    module: nn.Module
    num_heads: int
    head_dim: int
    text: TextPlace | None = None
    switch: KernelSwitch | None = None


class TransformerCall(NamedTuple):
    """Timestep and token grid of one call of a transformer.

    Args:
        timestep: the value it was called with, a tensor of one element.
        grid: latent frames, height and width in tokens; None where `positions` is given.
        tail: further tokens after those of the grid, e.g. of a conditioning image.
        positions: (tokens, 3), frame, row and column of every token but text; None where `grid` is given.
    """

    timestep: Tensor
    grid: Grid | None
    tail: int = 0
    positions: Tensor | None = None

    def grid_and_tail(self) -> tuple[Grid, int]:
        """Return the grid and the number of tokens beyond it; of several images by positions, the first is the grid."""
        if self.grid is not None:
            return self.grid, self.tail
        assert self.positions is not None
        first = self.positions[self.positions[:, 0] == self.positions[0, 0]].long()
        grid = (1, int(first[:, 1].max()) + 1, int(first[:, 2].max()) + 1)
        if grid[1] * grid[2] != len(first):
            grid = (1, 1, len(first))
        return grid, len(self.positions) - len(first)


ReadCall = Callable[[nn.Module, Mapping[str, Any]], TransformerCall]
"""Makes a `TransformerCall` of a transformer's arguments by name."""


@dataclass(frozen=True)
class TransformerSite:
    """One transformer of a pipeline with its self-attention layers, in the order in which they run.

    `arguments` names its forward's positional arguments.
    """

    name: str
    module: nn.Module
    layers: tuple[LayerSite, ...]
    read_call: ReadCall
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSites:
    """All transformers of a pipeline, and its scheduler's timesteps.

    Args:
        transformers: in the order in which they run.
        timesteps: returns the timestep argument of each denoising step, in order; evaluated at every call, since a
            pipeline sets them when it starts.
        step_index: returns the scheduler's own step index, where it has one; it decides between steps whose timesteps
            a low-precision dtype rounds to the same value.
    """

    transformers: tuple[TransformerSite, ...]
    timesteps: Callable[[], Sequence[float]]
    step_index: Callable[[], int | None] = lambda: None

    @property
    def layers(self) -> tuple[LayerSite, ...]:
        """Every self-attention layer, in the order in which they run."""
        return tuple(layer for transformer in self.transformers for layer in transformer.layers)
