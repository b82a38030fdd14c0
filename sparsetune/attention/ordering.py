"""Token orders: in which order the tokens of a latent video are cut into blocks.

Attention doesn't depend on the order of its tokens, but blocks do: tokens that are neighbours in the video have
similar keys, so a block of neighbours is described well by its mean, and fewer blocks need to be computed. Heads differ
in what they look at: one attends within a frame, another to the same place in all frames, a third along a column; each
needs few blocks in an order that puts those tokens together. q, k and v are permuted before the attention, and its
output is permuted back.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetune.attention.device import fits_triton

Grid = tuple[int, int, int]  # latent frames, height and width, in tokens
TokenOrder = str | tuple[str, ...]  # one of `ORDERS` for all heads of a layer, or one for each head


@dataclass(frozen=True)
class TokenLayout:
    """Positions of video and text tokens in a sequence."""

    grid: Grid  # the video tokens lie in raster order over it
    text: range  # positions of the text tokens, before or after all others
    tail: int = 0  # further tokens right after the video's, e.g. of a conditioning image; they stay where they are

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid) + self.tail + len(self.text)


@dataclass(frozen=True)
class Permutation:
    """A token order as positions to read tokens at, and their inverse; (orders, tokens) where heads differ."""

    forward: Tensor  # int64 (tokens,) or (orders, tokens)
    inverse: Tensor
    of_head: Tensor | None = None  # index of each head's order, int64 (heads,)

    def order(self, x: Tensor) -> Tensor:
        """Put the tokens of x (batch, heads, tokens, head_dim) in the order."""
        return self._gather([x], self.forward)[0]

    def order_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `order` of each, which a GPU does in one launch."""
        q, k, v = self._gather([q, k, v], self.forward)
        return q, k, v

    def undo(self, x: Tensor) -> Tensor:
        """Put ordered tokens back; exact."""
        return self._gather([x], self.inverse)[0]

    def _gather(self, tensors: list[Tensor], positions: Tensor) -> list[Tensor]:
        if all(fits_triton(x) and x.shape == tensors[0].shape and not x.requires_grad for x in tensors):
            from sparsetune.attention.reorder_triton import reorder

            return reorder(tensors, positions, self.of_head)
        by_head = positions if self.of_head is None else positions.index_select(0, self.of_head)
        return [_read_rows(x, by_head.expand(x.shape[1], -1)) for x in tensors]


def _read_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Read x (batch, heads, tokens, head_dim) at each head's positions, (heads, tokens).

    Rows are copied whole, out of memory as it lies, which is faster than by `x[..., positions, :]` or `gather`.
    """
    batch, num_heads, num_tokens, head_dim = x.shape
    head = torch.arange(num_heads, device=x.device)[:, None]
    if x.transpose(1, 2).is_contiguous():  # a token's heads side by side, as projections leave them
        rows, places = x.transpose(1, 2), positions * num_heads + head
    else:
        rows, places = x, positions + head * num_tokens
    return rows.reshape(batch, -1, head_dim).index_select(1, places.flatten()).view(x.shape)


def permutation(order: TokenOrder, layout: TokenLayout, device: torch.device | str = "cpu") -> Permutation | None:
    """Return the permutation that puts a sequence in `order`; None for raster. Text tokens stay where they are."""
    names = {order} if isinstance(order, str) else set(order)
    if names == {"raster"}:
        return None
    forward, inverse = _positions(layout, str(device))
    if isinstance(order, str) or len(names) == 1:
        index = list(ORDERS).index(names.pop())
        return Permutation(forward[index], inverse[index])
    return Permutation(forward, inverse, _order_indices(order, str(device)))


@functools.lru_cache(maxsize=16)
def _positions(layout: TokenLayout, device: str) -> tuple[Tensor, Tensor]:
    """Positions of every order and their inverses, int64 (orders, tokens) each, as `ORDERS` lists them."""
    first = len(layout.text) if layout.text.start == 0 else 0
    with torch.inference_mode(False):  # cached tensors are used outside of inference mode too
        forward = torch.arange(layout.num_tokens).repeat(len(ORDERS), 1)
        for index, sort_key in enumerate(ORDERS.values()):
            video = slice(first, first + math.prod(layout.grid))
            forward[index, video] = first + torch.argsort(sort_key(layout.grid), stable=True)
        return forward.to(device), torch.argsort(forward, dim=-1).to(device)


@functools.lru_cache(maxsize=1024)
def _order_indices(orders: tuple[str, ...], device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([list(ORDERS).index(order) for order in orders], device=device)


def _coordinates(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of every token in raster order, each int64 (tokens,)."""
    axes = torch.meshgrid(*(torch.arange(length) for length in grid), indexing="ij")
    frame, row, column = (axis.flatten() for axis in axes)
    return frame, row, column


def _axis_key(grid: Grid, axes: str) -> Tensor:
    """Sort key of a walk along the axes, the outermost first: `fhw` is raster."""
    places, lengths = dict(zip("fhw", _coordinates(grid), strict=True)), dict(zip("fhw", grid, strict=True))
    key = torch.zeros(math.prod(grid), dtype=torch.int64)
    for axis in axes:
        key = key * lengths[axis] + places[axis]
    return key


def _tile_key(grid: Grid, tile: Grid) -> Tensor:
    """Sort key that walks whole tiles in raster order; tokens within a tile keep their raster order."""
    tiles = [axis // length for axis, length in zip(_coordinates(grid), tile, strict=True)]
    counts = [-(-length // tile_length) for length, tile_length in zip(grid, tile, strict=True)]
    return (tiles[0] * counts[1] + tiles[1]) * counts[2] + tiles[2]


def _frame_hilbert_key(grid: Grid) -> Tensor:
    frame, row, column = _coordinates(grid)
    along = _hilbert_index((row, column), max(grid[1:]))
    return frame * (int(along.max()) + 1) + along


def _hilbert_index(axes: tuple[Tensor, ...], extent: int) -> Tensor:
    """Distance along the Hilbert curve of the smallest power-of-two cube that holds `extent`, int64 (points,).

    Skilling's algorithm (J. Skilling, 'Programming the Hilbert curve', AIP Conf. Proc. 707, 2004), for all points
    at once. The axes are coordinates in [0, extent), (points,) each; neighbours on the curve are so on the grid.
    """
    bits = max(1, (extent - 1).bit_length())
    x = [axis.clone() for axis in axes]
    mask = 1 << (bits - 1)
    while mask > 1:  # undo the excess rotations, from the coarsest level to the finest
        low = mask - 1
        for axis in range(len(x)):
            set_here = (x[axis] & mask) != 0
            swap = torch.where(set_here, 0, (x[0] ^ x[axis]) & low)
            x[0] = torch.where(set_here, x[0] ^ low, x[0] ^ swap)
            x[axis] = x[axis] ^ swap if axis else x[0]
        mask >>= 1
    for axis in range(1, len(x)):  # Gray encode
        x[axis] = x[axis] ^ x[axis - 1]
    flips = torch.zeros_like(x[0])
    mask = 1 << (bits - 1)
    while mask > 1:
        flips = torch.where((x[-1] & mask) != 0, flips ^ (mask - 1), flips)
        mask >>= 1
    index = torch.zeros_like(x[0])
    for bit in reversed(range(bits)):  # interleave the bits, first axis highest
        for bits_of_axis in x:
            index = (index << 1) | (((bits_of_axis ^ flips) >> bit) & 1)
    return index


ORDERS: dict[str, Callable[[Grid], Tensor]] = {
    "raster": lambda grid: _axis_key(grid, "fhw"),
    **{axes: functools.partial(_axis_key, axes=axes) for axes in ("fwh", "hfw", "hwf", "wfh", "whf")},
    "tiles": lambda grid: _tile_key(grid, (1, 8, 8)),
    "cubes": lambda grid: _tile_key(grid, (4, 4, 4)),
    "hilbert": _frame_hilbert_key,
    "hilbert3d": lambda grid: _hilbert_index(_coordinates(grid), max(grid)),
}
"""Name to sort key. `raster` goes through frames, rows and columns; `fwh` to `whf` name the axes in another order, the
outermost first: `hfw` puts a row of all frames together, `wfh` a column, `hwf` and `whf` a place in all frames. `tiles`
are 8 × 8 within a frame and `cubes` 4 × 4 × 4 over space and time, 64 tokens each (SpargeAttn's key block); `hilbert`
walks each frame along a Hilbert curve, `hilbert3d` the whole latent video."""
