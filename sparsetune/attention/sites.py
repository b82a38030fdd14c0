"""The self-attention modules of a pipeline: all that `sparsify` knows of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from sparsetune.attention.ordering import Grid
from sparsetune.attention.step_cache import StepCaching

TextPlace = Literal["start", "end"]


DenseCall = Callable[..., Tensor]
"""Dense attention, (q, k, v, *, mask, dropout, is_causal, scale, enable_gqa), over (batch, heads, tokens, head_dim)."""


class KernelSwitch(Protocol):
    """A module's choice among dense kernels that don't all pass `scaled_dot_product_attention`."""

    def dense(self) -> DenseCall | None:
        """Return the kernel that is chosen now; None where it is PyTorch's."""

    def to_native(self) -> Any:
        """Choose PyTorch's; return what `restore` takes."""

    def restore(self, before: Any) -> None: ...


@dataclass(frozen=True)
class LayerSite:
    """One self-attention module: the one whose forward makes the attention call."""

    name: str  # path from the pipeline, e.g. `transformer.transformer_blocks.0.attn1`
    module: nn.Module
    num_heads: int
    head_dim: int
    text: TextPlace | None = None  # where text tokens are in q, k and v, before or after all others
    switch: KernelSwitch | None = None  # None where it always calls PyTorch's dense kernel


class TransformerCall(NamedTuple):
    """Timestep and token grid of one call of a transformer, by `grid` or by `positions`; by neither, it is one row."""

    timestep: Tensor  # one element
    grid: Grid | None
    tail: int = 0  # tokens after those of the grid, e.g. of a conditioning image
    positions: Tensor | None = None  # (tokens, 3 or more), frame, row and column of every token but text
    grid_last: bool = False  # whether `positions` are those of all tokens, and the grid's the last

    def grid_and_tail(self, num_tokens: int = 0) -> tuple[Grid, int]:
        """Return the grid and the number of tokens beyond it; of several images by positions, the first is the grid.

        `num_tokens` is the length of a sequence of which nothing is known.
        """
        if self.grid is not None:
            return self.grid, self.tail
        if self.positions is None:
            return (1, 1, num_tokens), 0
        if self.grid_last:
            return _last_grid(self.positions), 0
        first = self.positions[self.positions[:, 0] == self.positions[0, 0], 1:3]
        height, width = (int(side) + 1 for side in (first.amax(0) - first.amin(0)).tolist())
        grid = (1, height, width) if height * width == len(first) else (1, 1, len(first))
        return grid, len(self.positions) - len(first)


def _last_grid(positions: Tensor) -> Grid:
    """Find the frames, rows and columns that the last positions go through in raster order."""
    row = (positions[:, :2] == positions[-1, :2]).all(1)
    width = _trailing(row)
    rows = positions[len(positions) % width :, :3].view(-1, width, 3)
    whole = (rows[:, :, :2] == rows[:, :1, :2]).all(2).all(1) & (rows[:, :, 2] == rows[-1, :, 2]).all(1)
    rows = rows[len(rows) - _trailing(whole) :, 0]
    height = _trailing(rows[:, 0] == rows[-1, 0])
    frames = rows[len(rows) % height :].view(-1, height, 3)
    alike = (frames[:, :, 0] == frames[:, :1, 0]).all(1) & (frames[:, :, 1] == frames[-1, :, 1]).all(1)
    return (_trailing(alike), height, width)


def _trailing(holds: Tensor) -> int:
    """Count the elements at the end that are all true."""
    return int(holds.flip(0).long().cumprod(0).sum())


ReadCall = Callable[[nn.Module, Mapping[str, Any]], TransformerCall]  # of the transformer's arguments by name


@dataclass(frozen=True)
class TransformerSite:
    """One transformer of a pipeline with its self-attention layers, in the order in which they run."""

    name: str
    module: nn.Module
    layers: tuple[LayerSite, ...]
    read_call: ReadCall
    arguments: tuple[str, ...] = ()  # names of its forward's positional arguments


@dataclass(frozen=True)
class AttentionSites:
    """All transformers of a pipeline, in the order in which they run, and its scheduler's timesteps."""

    transformers: tuple[TransformerSite, ...]
    # The timestep argument of each denoising step; read at every call, since a pipeline sets them when it starts
    timesteps: Callable[[], Sequence[float]]
    # The scheduler's own; it decides between steps whose timesteps a low-precision dtype rounds to the same value
    step_index: Callable[[], int | None] = lambda: None
    caching: StepCaching | None = None  # None where no step cache can be installed
    counts_steps: bool = False  # whether `step_index` says which step runs, rather than the timestep

    @property
    def layers(self) -> tuple[LayerSite, ...]:
        return tuple(layer for transformer in self.transformers for layer in transformer.layers)
