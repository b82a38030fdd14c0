"""Recognition of a rendered video's attributes from its pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from .drawing import Paths, backgrounds, coverage
from .world import BACKGROUNDS, COLOURS, SHAPES, Scene

_SYMMETRY = (1, 4, 3, 5)  # rotational symmetry of each shape in SHAPES
_NUM_ANGLES = 16
_SHORTER_SIDE = 64  # px; lengths below are in px of a video that is reduced to this


@dataclass(frozen=True)
class Reading:
    """Attributes recognized in a video; 'none' if there is no shape, 'still' if nothing moves."""

    background: str
    colour: str
    shape: str
    motion: str

    def shows(self, scene: Scene) -> bool:
        """Return whether all attributes match a one-shape scene."""
        actor = scene.actors[0]
        return self == Reading(scene.background, actor.colour, actor.shape, actor.motion)


@dataclass(frozen=True)
class Adherence:
    """Fraction of videos, in [0, 1], that match the caption in each attribute."""

    background: float
    colour: float
    shape: float
    motion: float


def adherence(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Adherence:
    """Compare recognized attributes with the requested one-shape scenes."""
    expected = [Reading(s.background, s.actors[0].colour, s.actors[0].shape, s.actors[0].motion) for s in scenes]
    pairs = list(zip(readings, expected, strict=True))
    rates = {
        field.name: sum(getattr(r, field.name) == getattr(e, field.name) for r, e in pairs) / len(pairs)
        for field in fields(Adherence)
    }
    return Adherence(**rates)


def read(frames: Tensor) -> Reading:
    """Recognize the attributes of a video with one shape.

    frames: (frames, height, width, 3) RGB uint8 of any size, reduced to 64 px on the shorter side
    by averaging areas. Each attribute is the one whose rendering is nearest to the pixels; motion
    thresholds are halfway between none and the smallest motion.
    """
    video = frames.permute(0, 3, 1, 2).float() / 255
    ratio = _SHORTER_SIDE / min(video.shape[-2:])
    shape_px = [round(length * ratio) for length in video.shape[-2:]]
    video = functional.interpolate(video, size=shape_px, mode="area")
    plates = backgrounds(torch.arange(len(BACKGROUNDS)), shape_px[0])
    near = (video[None] - plates[:, None]).norm(dim=2) < 0.12
    background = int(near.flatten(1).sum(1).argmax())
    behind = plates[background]
    inside = (video - behind).norm(dim=1) > 0.25
    name = tuple(BACKGROUNDS)[background]
    if int(inside.sum()) < 20 * len(frames):
        return Reading(name, "none", "none", "none")
    palette = torch.tensor(list(COLOURS.values()))
    pixels = video.permute(0, 2, 3, 1)[inside]
    colour = int(torch.cdist(pixels, palette).argmin(1).bincount(minlength=len(COLOURS)).argmax())
    axis = palette[colour][:, None, None] - behind
    alpha = (((video - behind) * axis).sum(1) / (axis * axis).sum(0)).clamp(0, 1)
    alpha = torch.where(alpha < 0.15, 0.0, alpha)
    area, centre = _area(alpha), _centre(alpha)
    shape, angle = _fit_shape(alpha, area, centre)
    return Reading(name, tuple(COLOURS)[colour], SHAPES[shape], _motion(area, centre, angle))


def _area(alpha: Tensor) -> Tensor:
    return alpha.sum((1, 2)).clamp(min=4.0)


def _centre(alpha: Tensor) -> Tensor:
    height, width = alpha.shape[1:]
    weight = alpha.sum((1, 2)).clamp(min=1e-3)
    x = (alpha * (torch.arange(width) + 0.5)).sum((1, 2)) / weight
    y = (alpha * (torch.arange(height) + 0.5)[:, None]).sum((1, 2)) / weight
    return torch.stack((x, y), -1)


def _fit_shape(alpha: Tensor, area: Tensor, centre: Tensor) -> tuple[int, Tensor]:
    """Return the shape whose rendering of equal area fits best, and its unwrapped angle in each frame."""
    num_frames, height, width = alpha.shape
    errors, angles = [], []
    for index, symmetry in enumerate(_SYMMETRY):
        period = 2 * math.pi / symmetry
        count = 1 if index == 0 else _NUM_ANGLES
        candidates = torch.arange(count) * period / count
        kind = torch.full((count,), index)
        unit = Paths(torch.tensor([[[width / 2, height / 2]]]), torch.full((1, 1), 12.0), torch.zeros(1, 1))
        per_radius = coverage(kind[:1], unit, height, width).sum() / 12.0**2
        radius = torch.sqrt(area / per_radius).expand(count, -1)
        paths = Paths(centre.expand(count, -1, -1), radius, candidates[:, None].expand(-1, num_frames))
        misfit = (coverage(kind, paths, height, width) - alpha).square().sum((2, 3)) / area
        best = misfit.min(0)
        errors.append(best.values.mean())
        angles.append(_unwrap(candidates[best.indices], period))
    shape = int(torch.stack(errors).argmin())
    return shape, angles[shape]


def _unwrap(angle: Tensor, period: float) -> Tensor:
    steps = angle.diff()
    steps = (steps + period / 2).remainder(period) - period / 2
    return torch.cat((torch.zeros(1), steps.cumsum(0)))


def _motion(area: Tensor, centre: Tensor, angle: Tensor) -> str:
    """Return the motion word for areas (frames,) in px², centres (frames, 2) and angles (frames,)."""
    growth = 0.5 * float((area[-3:].mean() / area[:3].mean()).log())
    dx, dy = (float(v) for v in centre[-3:].mean(0) - centre[:3].mean(0))
    reversal = float(centre[:, 1].diff().abs().sum() - (centre[-1, 1] - centre[0, 1]).abs())
    if abs(growth) > 0.5:
        return "growing" if growth > 0 else "shrinking"
    if reversal > 12:
        return "bouncing"
    if max(abs(dx), abs(dy)) > 8:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    return "turning" if float(angle[-1]) > 0.7 else "still"
