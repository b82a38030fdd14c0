"""Timestep and token grid of a transformer's call, read from its arguments, and a scheduler's timesteps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsetune.attention.ordering import Grid
from sparsetune.attention.sites import TransformerCall


def latents_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, channels, height, width) or (batch, channels, frames, height, width)."""
    return TransformerCall(_time(arguments), _grid(module, arguments["hidden_states"].shape[2:]))


def frames_first_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, frames, channels, height, width), their frames padded to whole patches."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = patch_of(module)
    grid = (-(-frames // patch[0]), height // patch[1], width // patch[2])
    return TransformerCall(_time(arguments), grid)


def frames_rows_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, frames, height, width, channels)."""
    return TransformerCall(_time(arguments), _grid(module, arguments["hidden_states"].shape[1:4]))


def context_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, channels, height, width), followed by a list of those of condition images."""
    grids = [_grid(module, latents.shape[2:]) for latents in arguments.get("context_latents") or ()]
    return latents_call(module, arguments)._replace(tail=sum(map(math.prod, grids)))


def items_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, items, channels, frames, height, width), or of one item without that dimension."""
    shape = arguments["hidden_states"].shape
    items = shape[1] if len(shape) == 6 else 1
    return TransformerCall(_time(arguments), _grid(module, (items * shape[-3], *shape[-2:])))


def patches_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, tokens, ...) with the shapes of the images in them, the one that is rendered first."""
    grid: Grid = tuple(arguments["shape_list"][0][0])
    tail = arguments["hidden_states"].shape[1] - math.prod(grid)
    return TransformerCall(_time(arguments), grid, tail)


def listed_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read a list of latents (channels, frames, height, width), each padded to whole blocks of 32 tokens.

    With condition images in the list, a list of latents for each, text comes between them: the tokens count as one row.
    """
    first = arguments["x"][0]
    if not isinstance(first, Tensor):
        return TransformerCall(_time(arguments), None)
    side, frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    grid = (first.shape[1] // frames, first.shape[2] // side, first.shape[3] // side)
    return TransformerCall(_time(arguments), grid, -math.prod(grid) % 32)


def sequence_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read nothing but the timestep: the tokens count as one row."""
    return TransformerCall(_time(arguments), None)


def all_positioned_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read packed tokens with a position for each, text and others first, the rendered image or video last."""
    ids = arguments["position_ids"]
    positions = ids[0] if ids.dim() == 3 else ids
    return TransformerCall(_time(arguments), None, positions=positions, grid_last=True)


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
    """Read latents (batch, tokens, channels) with a position for each, perhaps condition images in another argument."""
    given = [arguments[name] for name in ("img_ids", "image_cond_ids") if arguments.get(name) is not None]
    ids = [each[0] if each.dim() == 3 else each for each in given]
    return TransformerCall(_time(arguments), None, positions=ids[0] if len(ids) == 1 else torch.cat(ids))


def shaped_call(module: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
    """Read latents (batch, tokens, channels) with the shapes of the images in them."""
    grid: Any = arguments["img_shapes"]
    while not isinstance(grid[0], int):
        grid = grid[0]
    tail = arguments["hidden_states"].shape[1] - math.prod(grid)
    return TransformerCall(_time(arguments), tuple(grid), tail)


_CHANNELS: Mapping[Any, int] = {frames_first_call: 2, frames_rows_call: -1}
"""The dimension of channels in a call's latents, where it isn't the one after the batch."""


def latents_of(
    read_call: Callable[[nn.Module, Mapping[str, Any]], TransformerCall],
    module: nn.Module,
    arguments: Mapping[str, Any],
) -> list[Tensor] | None:
    """Return the latents that a call denoises, each (channels, frames, height, width), without condition channels.

    None where they aren't one tensor, or their grid isn't known.
    """
    latents, channels = arguments.get("hidden_states"), _CHANNELS.get(read_call, 1)
    if not isinstance(latents, Tensor) or latents.dim() not in (3, 4, 5):
        return None
    if latents.dim() == 3:
        grid, _ = read_call(module, arguments).grid_and_tail(latents.shape[1])
        latents, channels = latents[:, : math.prod(grid)].reshape(len(latents), *grid, -1), -1
    elif latents.dim() == 4:
        latents = latents.unsqueeze(2)
    count = getattr(module.config, "out_channels", None)
    return list(latents.movedim(channels, 1)[:, :count].unbind())


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


def noise_share(scheduler: Any, step: int) -> float | None:
    """Noise over noise and signal at a step, in [0, 1]; None where a scheduler doesn't say."""
    noise: float
    if getattr(scheduler, "sigmas", None) is not None:
        noise = float(scheduler.sigmas[step])
        if float(scheduler.sigmas.max()) <= 1.0:  # of flow matching, where signal and noise are 1 together
            return 1.0 - noise if getattr(scheduler.config, "invert_sigmas", False) else noise
    elif getattr(scheduler, "alphas_cumprod", None) is not None:
        signal = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        noise = math.sqrt((1.0 - signal) / signal) if signal else math.inf
    else:
        return None
    return 1.0 if math.isinf(noise) else noise / (1.0 + noise)


def patch_of(module: nn.Module) -> Grid:
    """Return (frames, rows, columns)."""
    config: Any = module.config
    size = getattr(config, "patch_size", None) or 1
    if not isinstance(size, int):
        return (1, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])
    return (getattr(config, "patch_size_t", None) or 1, size, size)


def _grid(module: nn.Module, shape: Sequence[int]) -> Grid:
    """Return the tokens of latents of shape ([frames,] height, width)."""
    frames, height, width = (1, *shape)[-3:]
    patch = patch_of(module)
    return (frames // patch[0], height // patch[1], width // patch[2])


def _time(arguments: Mapping[str, Any]) -> Tensor:
    """Return the timestep of the last token: conditioning frames, which come first, have another; 0 without any."""
    given = (arguments[name] for name in ("timestep", "timesteps", "t") if arguments.get(name) is not None)
    return _tensor(next(given, 0.0))[-1]


def _tensor(value: Any) -> Tensor:
    return (value if isinstance(value, Tensor) else torch.tensor(value)).flatten()


def _listed(values: Tensor | None) -> list[float]:
    return [] if values is None else [float(value) for value in values.tolist()]
