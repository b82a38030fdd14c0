"""Which denoising steps run dense."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetune.errors import ThresholdError


@dataclass(frozen=True)
class DenseSchedule:
    """The first `dense_fraction` of the denoising steps run dense, the rest sparse.

    Early steps decide the layout of a video, and sparse attention there costs the most quality (Radial
    Attention and Sparse VideoGen keep 25 to 30 % of the steps dense).

    Args:
        dense_fraction: fraction of the steps in [0, 1], rounded up to whole steps.

    Raises:
        ThresholdError: the fraction is outside [0, 1] or not a number.
    """

    dense_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ThresholdError(f"dense_fraction must be in [0, 1], but is {self.dense_fraction}; give e.g. 0.25")

    def num_dense_steps(self, num_steps: int) -> int:
        """Count the dense steps at the start of a generation of `num_steps` steps."""
        # Rounding first keeps 0.1 * 30 = 3.0000000000000004 from becoming 4 steps.
        return math.ceil(round(self.dense_fraction * num_steps, 9))

    def is_dense(self, step: int, num_steps: int) -> bool:
        """Tell whether step `step` (0 is the first, noisiest one) of `num_steps` runs dense."""
        return step < self.num_dense_steps(num_steps)


def step_of(timestep: float, timesteps: Sequence[float]) -> int | None:
    """Find the step that a transformer call belongs to by its timestep value.

    Counting calls instead would go wrong wherever a pipeline makes two calls a step (guidance without
    batching) or starts in the middle of the list (video-to-video).

    Args:
        timestep: the value the transformer was called with.
        timesteps: the scheduler's values in the order they are run.

    Returns:
        The index of the nearest value, or None when `timesteps` is empty or none is within 1e-3 of it,
        relative to the largest value: the transformer was then called outside of this generation.
    """
    if not timesteps:
        return None
    nearest = min(range(len(timesteps)), key=lambda index: abs(timesteps[index] - timestep))
    tolerance = 1e-3 * max(1.0, max(abs(value) for value in timesteps))
    return nearest if abs(timesteps[nearest] - timestep) <= tolerance else None
