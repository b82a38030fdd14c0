"""How sparse each denoising step runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetune.errors import ThresholdError


@dataclass(frozen=True)
class DenseSchedule:
    """The first `dense_fraction` of the denoising steps run dense; the others drop as much as `drop_scale` says.

    Steps bear sparsity very differently: an error early in the generation moves the layout of the video, one in the
    last step goes into the frames as it is, and those between are forgiven. So a step may drop a multiple of what
    its thresholds would leave out: with a scale of g, cdfthreshd c becomes 1 − g · (1 − c), and topk likewise.

    Args:
        dense_fraction: fraction of the steps in [0, 1], rounded up to whole steps.
        drop_scale: factors of at least 0, spread evenly over all steps; 0 runs dense. Empty is 1 throughout, the
            thresholds as they are.

    Raises:
        ThresholdError: the fraction is outside [0, 1], or a factor is negative, infinite or not a number.
    """

    dense_fraction: float = 0.0
    drop_scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ThresholdError(f"dense_fraction must be in [0, 1], but is {self.dense_fraction}; give e.g. 0.25")
        if any(not 0.0 <= factor < math.inf for factor in self.drop_scale):
            raise ThresholdError(
                f"drop_scale must be factors of at least 0, but is {self.drop_scale}; give e.g. 0.5, 1 and 2"
            )

    def num_dense_steps(self, num_steps: int) -> int:
        """Count the dense steps at the start of a generation of `num_steps` steps."""
        # Rounding first keeps 0.1 * 30 = 3.0000000000000004 from becoming 4 steps.
        return math.ceil(round(self.dense_fraction * num_steps, 9))

    def scale(self, step: int | None, num_steps: int) -> float:
        """Give the factor on what step `step` (0 is the first, noisiest one) of `num_steps` drops; 0 is dense.

        An unknown step (None) drops what the thresholds say.
        """
        if step is None:
            return 1.0
        if step < self.num_dense_steps(num_steps):
            return 0.0
        return self.drop_scale[phase(step, num_steps, len(self.drop_scale))] if self.drop_scale else 1.0

    def is_dense(self, step: int, num_steps: int) -> bool:
        """Tell whether step `step` of `num_steps` runs dense."""
        return self.scale(step, num_steps) == 0.0


def phase(step: int, num_steps: int, num_phases: int) -> int:
    """Say which of `num_phases` equal parts of the generation step `step` of `num_steps` lies in."""
    return min(step * num_phases // num_steps, num_phases - 1)


def step_of(
    timestep: float, timesteps: Sequence[float], rounding: float = 0.0, step_index: int | None = None
) -> int | None:
    """Find the step that a transformer call belongs to by its timestep value.

    Counting calls instead would go wrong wherever a pipeline makes two calls a step (guidance without
    batching) or starts in the middle of the list (video-to-video).

    Args:
        timestep: the value the transformer was called with.
        timesteps: the scheduler's values in the order they are run.
        rounding: relative rounding of `timestep`: bfloat16 gives the neighbouring steps of a shifted schedule the
            same value.
        step_index: the scheduler's own count; it decides among the steps that rounding makes alike.

    Returns:
        The index of the nearest value, or None when `timesteps` is empty or none is within the rounding or 1e-3 of
        it, relative to the largest value: the transformer was then called outside of this generation.
    """
    if not timesteps:
        return None
    distances = [abs(value - timestep) for value in timesteps]
    nearest = min(range(len(timesteps)), key=distances.__getitem__)
    slack = rounding * abs(timestep)
    if distances[nearest] > max(slack, 1e-3 * max(1.0, max(abs(value) for value in timesteps))):
        return None
    alike = step_index is not None and 0 <= step_index < len(timesteps) and distances[step_index] <= slack
    return step_index if alike else nearest
