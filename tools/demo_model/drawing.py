"""Renderer of the synthetic training videos, in batches on any device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .world import BACKGROUNDS, BASE_SIZE, COLOURS, MOTIONS, SHAPES, Scene, Size

# Circumradius divided by nominal radius, so that shapes of the same nominal radius look equally large.
_CIRCUMRADIUS = torch.tensor([1.0, 1.25, 1.5, 1.5])
_STAR_INNER = 0.5
_EDGE_PX = 1.5


@dataclass(frozen=True)
class Paths:
    """Shapes by frame: centre (n, frames, 2) as x, y in px, radius (n, frames) in px, angle (n, frames) in radians."""

    centre: Tensor
    radius: Tensor
    angle: Tensor


def coverage(shape: Tensor, paths: Paths, height: int, width: int) -> Tensor:
    """Return the antialiased coverage of each pixel by a shape, in [0, 1].

    shape: (n,) index into SHAPES. height, width: of the frames in px.
    Returns (n, frames, height, width) float32.
    """
    device = shape.device
    across, down = (torch.arange(length, device=device) + 0.5 for length in (width, height))
    dx = across.view(1, 1, 1, -1) - paths.centre[..., 0, None, None]
    dy = down.view(1, 1, -1, 1) - paths.centre[..., 1, None, None]
    rho = torch.sqrt(dx * dx + dy * dy + 1e-9)
    theta = torch.atan2(dx, -dy) - paths.angle[..., None, None]  # 0 is up, clockwise
    kind = shape.view(-1, 1, 1, 1)
    outer = (_CIRCUMRADIUS.to(device)[shape].view(-1, 1) * paths.radius)[..., None, None]
    distance = rho - outer
    for index, sides in ((1, 4), (2, 3)):
        half = math.pi / sides
        rotated = theta + (half if sides == 4 else 0.0)  # a square rests on a side
        folded = (rotated + half).remainder(2 * half) - half
        polygon = rho * torch.cos(half - folded.abs()) - outer * math.cos(half)
        distance = torch.where(kind == index, polygon, distance)
    distance = torch.where(kind == 3, _star_distance(rho, theta, outer), distance)
    return (0.5 - distance / _EDGE_PX).clamp(0, 1)


def _star_distance(rho: Tensor, theta: Tensor, outer: Tensor) -> Tensor:
    """Return the signed distance to the nearest edge line of a five-pointed star, tip up."""
    half = math.pi / 5
    folded = ((theta + half).remainder(2 * half) - half).abs()
    inner_x, inner_y = _STAR_INNER * math.cos(half), _STAR_INNER * math.sin(half)
    length = math.hypot(1 - inner_x, inner_y)
    normal_x, normal_y = inner_y / length, (1 - inner_x) / length
    return (rho * torch.cos(folded) - outer) * normal_x + rho * torch.sin(folded) * normal_y


def backgrounds(index: Tensor, height: int) -> Tensor:
    """Return the background frames for indices (n,) and a height in px: (n, 3, height, 1) in [0, 1]."""
    colours = torch.tensor([BACKGROUNDS[name] for name in BACKGROUNDS], device=index.device)
    down = torch.linspace(0, 1, height, device=index.device).view(1, 1, -1, 1)
    top, bottom = colours[index, 0, :, None, None], colours[index, 1, :, None, None]
    return top + (bottom - top) * down


def draw_paths(motion: Tensor, small: Tensor, side: Tensor, size: Size, generator: torch.Generator | None) -> Paths:
    """Return a random path for each actor in a video of a size.

    motion: (n,) index into MOTIONS. small: (n,) bool, true where two actors share the frame.
    side: (n,) in {-1, 0, 1}: left half, whole frame, right half.
    """
    n, device = motion.shape[0], motion.device
    middle_x, middle_y = size.width / size.unit / 2, size.height / size.unit / 2

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, device=device, generator=generator)

    def where(name: str, value: Tensor, other: Tensor) -> Tensor:
        return torch.where((motion == MOTIONS.index(name)).view(-1, 1), value, other)

    t = torch.linspace(0, 1, size.num_frames, device=device).view(1, -1)
    scale = torch.where(small, 0.62, 1.0).view(-1, 1)
    span = uniform(22, 30)
    spread = torch.where(small, 0.35, 1.0).view(-1, 1)
    x = middle_x + side.view(-1, 1) * 15 + uniform(-8, 8) * spread + 0 * t
    y = middle_y + uniform(-8, 8) + 0 * t
    along = (t - 0.5) * span
    horizontal = middle_x + side.view(-1, 1) * 15 + uniform(-3, 3) * spread
    vertical = middle_y + uniform(-3, 3)
    x = where("moving right", horizontal + along * (1.35 * spread).clamp(max=1), x)
    x = where("moving left", horizontal - along * (1.35 * spread).clamp(max=1), x)
    y = where("moving down", vertical + along, y)
    y = where("moving up", vertical - along, y)
    hop = torch.sin(math.pi * (2 * t + uniform(0, 1))).abs()
    y = where("bouncing", middle_y + 13 + uniform(-2, 2) - hop * uniform(22, 28), y)
    radius = uniform(10, 13) + 0 * t
    small_end, large_end = uniform(5, 6.5), uniform(15, 17)
    radius = where("growing", small_end + (large_end - small_end) * t, radius)
    radius = where("shrinking", large_end + (small_end - large_end) * t, radius)
    angle = where("turning", uniform(1.4, 2.0) * t, torch.zeros_like(x))
    return Paths(torch.stack((x, y), -1) * size.unit, radius * scale * size.unit, angle)


@dataclass(frozen=True)
class Clips:
    """Videos (n, 3, frames, height, width) in [-1, 1] and foreground (n, frames, height, width) in [0, 1]."""

    video: Tensor
    foreground: Tensor


def draw(
    scenes: list[Scene], device: torch.device, generator: torch.Generator | None = None, size: Size = BASE_SIZE
) -> Clips:
    """Render one clip of a size for each scene; attributes that a caption doesn't specify are random."""
    n = len(scenes)
    video = backgrounds(_indices([s.background for s in scenes], tuple(BACKGROUNDS), device), size.height)
    video = video.unsqueeze(2).expand(n, 3, size.num_frames, size.height, size.width).clone()
    foreground = torch.zeros(n, size.num_frames, size.height, size.width, device=device)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    for position in (0, 1):
        rows = [i for i, s in enumerate(scenes) if len(s.actors) > position]
        if not rows:
            continue
        actors = [scenes[i].actors[position] for i in rows]
        shared = torch.tensor([len(scenes[i].actors) > 1 for i in rows], device=device)
        side = shared.float() * (2 * position - 1)
        motion = _indices([a.motion for a in actors], MOTIONS, device)
        shape = _indices([a.shape for a in actors], SHAPES, device)
        alpha = coverage(shape, draw_paths(motion, shared, side, size, generator), size.height, size.width)
        colour = palette[_indices([a.colour for a in actors], tuple(COLOURS), device)]
        index = torch.tensor(rows, device=device)
        video[index] = torch.lerp(video[index], colour[:, :, None, None, None], alpha[:, None])
        foreground[index] = torch.maximum(foreground[index], alpha)
    return Clips(video * 2 - 1, foreground)


def _indices(names: list[str], words: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([words.index(name) for name in names], device=device)
