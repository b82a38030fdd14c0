"""Schedule of dense and sparse denoising steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetune.errors import ThresholdError


@dataclass(frozen=True)
class DenseSchedule:
    """Runs the first `dense_fraction` of the denoising steps dense, and scales what the others drop by `drop_scale`.

    Steps tolerate sparsity very differently: an early error changes the layout of the video, one in the last step goes
    into the frames as it is, and those between are corrected by later steps. So a step may drop a multiple of what its
    thresholds leave out: with a scale of g, cdfthreshd c becomes 1 − g · (1 − c), and topk likewise.

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
            raise ThresholdError(f"dense_fraction must be in [0, 1], got {self.dense_fraction}")
        if any(not 0.0 <= factor < math.inf for factor in self.drop_scale):
            raise ThresholdError(f"drop_scale must be factors of at least 0, e.g. 0.5, 1 and 2, got {self.drop_scale}")

    def num_dense_steps(self, num_steps: int) -> int:
        """Count the dense steps at the start of a generation of `num_steps` steps."""
        # Rounding first keeps 0.1 * 30 = 3.0000000000000004 from becoming 4 steps.
        return math.ceil(round(self.dense_fraction * num_steps, 9))

    def scale(self, step: int | None, num_steps: int) -> float:
        """Return the factor on what a step (0 is the noisiest) drops: 0 is dense, 1 where the step is None."""
        if step is None:
            return 1.0
        if step < self.num_dense_steps(num_steps):
            return 0.0
        return self.drop_scale[phase(step, num_steps, len(self.drop_scale))] if self.drop_scale else 1.0

    def ending_dense(self, fraction: float, num_steps: int) -> "DenseSchedule":
        """Return the schedule that also runs a fraction of the last steps dense, rounded up to whole steps."""
        kept = num_steps - DenseSchedule(fraction).num_dense_steps(num_steps)
        if kept == num_steps:
            return self
        scales = tuple(self.scale(step, num_steps) if step < kept else 0.0 for step in range(num_steps))
        return DenseSchedule(self.dense_fraction, scales)

    def is_dense(self, step: int, num_steps: int) -> bool:
        """Whether step `step` of `num_steps` runs dense."""
        return self.scale(step, num_steps) == 0.0


def phase(step: int, num_steps: int, num_phases: int) -> int:
    """Return the index of the part of the generation, of `num_phases` equal ones, that a step lies in."""
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
        rounding: relative rounding of `timestep`: bfloat16 makes neighbouring steps of a shifted schedule equal.
        step_index: the scheduler's own; it decides among steps whose timesteps rounding makes equal.

    Returns:
        The index of the nearest value, or None when `timesteps` is empty or none is within the rounding or 1e-3 of
        it, relative to the largest value: the call is then none of this generation's.
    """
    if not timesteps:
        return None
    distances = [abs(value - timestep) for value in timesteps]
    nearest = min(range(len(timesteps)), key=distances.__getitem__)
    slack = rounding * abs(timestep)
    if distances[nearest] > max(slack, 1e-3 * max(1.0, max(abs(value) for value in timesteps))):
        return None
    equal = step_index is not None and 0 <= step_index < len(timesteps) and distances[step_index] <= slack
    return step_index if equal else nearest
