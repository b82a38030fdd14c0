"""What a rendered video shows, read from its pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .drawing import Paths, backgrounds, coverage
from .world import BACKGROUNDS, COLOURS, FRAME_SIZE, SHAPES, Scene

_SYMMETRY = (1, 4, 3, 5)  # turns after which a shape of SHAPES looks the same
_NUM_ANGLES = 16


@dataclass(frozen=True)
class Reading:
    """The words that a video shows; 'none' where there is no shape, 'still' where nothing moves."""

    background: str
    colour: str
    shape: str
    motion: str

    def shows(self, scene: Scene) -> bool:
        """Tell whether every word is the scene's, which has one shape."""
        actor = scene.actors[0]
        return self == Reading(scene.background, actor.colour, actor.shape, actor.motion)


@dataclass(frozen=True)
class Adherence:
    """For each kind of word the fraction of videos, in [0, 1], that show what the caption says."""

    background: float
    colour: float
    shape: float
    motion: float


def adherence(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Adherence:
    """Compare readings with the one-shape scenes that were asked for."""
    wanted = [Reading(s.background, s.actors[0].colour, s.actors[0].shape, s.actors[0].motion) for s in scenes]
    pairs = list(zip(readings, wanted, strict=True))
    rates = {
        field.name: sum(getattr(r, field.name) == getattr(w, field.name) for r, w in pairs) / len(pairs)
        for field in fields(Adherence)
    }
    return Adherence(**rates)


def read(frames: Tensor) -> Reading:
    """Read one video of one shape.

    frames: (frames, height, width, 3) RGB uint8, 64 x 64 pixels. Each word is the one whose
    drawing is nearest to the pixels; thresholds lie halfway between still and the least motion.
    """
    video = frames.permute(0, 3, 1, 2).float() / 255
    plates = backgrounds(torch.arange(len(BACKGROUNDS)))
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
    axis = torch.arange(FRAME_SIZE) + 0.5
    weight = alpha.sum((1, 2)).clamp(min=1e-3)
    x = (alpha * axis).sum((1, 2)) / weight
    y = (alpha * axis[:, None]).sum((1, 2)) / weight
    return torch.stack((x, y), -1)


def _fit_shape(alpha: Tensor, area: Tensor, centre: Tensor) -> tuple[int, Tensor]:
    """Return the shape whose drawing of equal area fits best, and its angle by frame, unwrapped."""
    num_frames = alpha.shape[0]
    errors, angles = [], []
    for index, symmetry in enumerate(_SYMMETRY):
        period = 2 * math.pi / symmetry
        count = 1 if index == 0 else _NUM_ANGLES
        candidates = torch.arange(count) * period / count
        kind = torch.full((count,), index)
        unit = Paths(torch.full((1, 1, 2), FRAME_SIZE / 2), torch.full((1, 1), 12.0), torch.zeros(1, 1))
        per_radius = coverage(kind[:1], unit).sum() / 12.0**2
        radius = torch.sqrt(area / per_radius).expand(count, -1)
        paths = Paths(centre.expand(count, -1, -1), radius, candidates[:, None].expand(-1, num_frames))
        misfit = (coverage(kind, paths) - alpha).square().sum((2, 3)) / area
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
    there_and_back = float(centre[:, 1].diff().abs().sum() - (centre[-1, 1] - centre[0, 1]).abs())
    if abs(growth) > 0.5:
        return "growing" if growth > 0 else "shrinking"
    if there_and_back > 12:
        return "bouncing"
    if max(abs(dx), abs(dy)) > 8:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    return "turning" if float(angle[-1]) > 0.7 else "still"
