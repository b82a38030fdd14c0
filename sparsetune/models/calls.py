"""Timestep and token grid of a transformer's call, read from its arguments, and a scheduler's timesteps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.ordering import Grid
from sparsetune.attention.sites import TransformerCall


def video_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, channels, frames, height, width)."""
    frames, height, width = arguments["hidden_states"].shape[-3:]
    patch = patch_of(module)
    return TransformerCall(_last(arguments["timestep"]), (frames // patch[0], height // patch[1], width // patch[2]))


def frames_first_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, frames, channels, height, width), their frames padded to whole patches."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = patch_of(module)
    grid = (-(-frames // patch[0]), height // patch[1], width // patch[2])
    return TransformerCall(_last(arguments["timestep"]), grid)


def image_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, channels, height, width)."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = patch_of(module)
    return TransformerCall(_last(arguments["timestep"]), (1, height // patch[1], width // patch[2]))


def packed_video_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, tokens, channels) with their grid in separate arguments.

    Conditioning frames have a lower timestep than the rest, wherever they lie. Where a pipeline passes coordinates
    instead of a grid, the tokens count as one row.
    """
    tokens = arguments["hidden_states"].shape[1]
    frames, height, width = (arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    known = 0 < frames * height * width <= tokens
    grid: Grid = (frames, height, width) if known else (1, 1, tokens)
    return TransformerCall(_tensor(arguments["timestep"]).max(), grid, tokens - math.prod(grid))


def positioned_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, tokens, channels) with a position for each."""
    ids = arguments["img_ids"]
    return TransformerCall(_last(arguments["timestep"]), None, positions=ids[0] if ids.dim() == 3 else ids)


def shaped_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, tokens, channels) with the shapes of the images in them."""
    grid: Any = arguments["img_shapes"]
    while not isinstance(grid[0], int):
        grid = grid[0]
    tail = arguments["hidden_states"].shape[1] - math.prod(grid)
    return TransformerCall(_last(arguments["timestep"]), tuple(grid), tail)


def timesteps(scheduler: Any) -> Sequence[float]:
    return _listed(scheduler.timesteps)


def flow_times(scheduler: Any) -> Sequence[float]:
    return [value / 1000 for value in _listed(scheduler.timesteps)]


def sigmas(scheduler: Any) -> Sequence[float]:
    """The scheduler's noise levels, without the last, at which no step starts."""
    return _listed(scheduler.sigmas)[:-1]


def sigma_ratios(scheduler: Any) -> Sequence[float]:
    """Noise over noise and signal at every step, in [0, 1)."""
    return [value / (1 + value) for value in sigmas(scheduler)]


def patch_of(module: nn.Module) -> Grid:
    """Return (frames, rows, columns)."""
    config: Any = module.config
    size = config.patch_size
    if not isinstance(size, int):
        return (size[0], size[1], size[2])
    return (getattr(config, "patch_size_t", None) or 1, size, size)


def _last(value: Any) -> Tensor:
    """Return the timestep of the last token: conditioning frames, which come first, have another."""
    return _tensor(value)[-1]


def _tensor(value: Any) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.tensor(value)).flatten()


def _listed(values: Tensor | None) -> list[float]:
    return [] if values is None else [float(value) for value in values.tolist()]
