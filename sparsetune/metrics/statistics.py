"""Summary statistics and paired differences of a metric over prompts, with bootstrap confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError

RESAMPLES = 10_000
"""Bootstrap resamples: the interval's ends then vary by under 1% of its width between seeds."""

MIN_FOR_INTERVAL = 6
"""Fewer prompts can't be significant: five differences share one sign by chance with probability 2 / 2**5 > 5%."""

_SLAB = 1 << 20  # resampled values held at a time


@dataclass(frozen=True)
class Summary:
    """One metric over all prompts.

    `std` is the sample standard deviation (n - 1; 0.0 for a single value). `ci95_low` and `ci95_high` are the 95%
    percentile bootstrap interval of the mean; for a single value both are that value.
    """

    mean: float
    std: float
    min: float
    max: float
    ci95_low: float
    ci95_high: float

    def to_dict(self) -> dict[str, float]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric between two runs on the same prompts.

    `mean` is that of after - before, with its 95% bootstrap interval; `better`, `worse` and `equal` count prompts in
    the metric's own direction.
    """

    mean: float
    ci95_low: float
    ci95_high: float
    better: int
    worse: int
    equal: int
    differences: tuple[float, ...]

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0, over at least `MIN_FOR_INTERVAL` prompts."""
        enough = len(self.differences) >= MIN_FOR_INTERVAL
        return enough and (self.ci95_low > 0.0 or self.ci95_high < 0.0)

    def to_dict(self) -> dict[str, float | bool | list[float]]:
        """The fields and `significant` as a JSON object."""
        return {**asdict(self), "differences": list(self.differences), "significant": self.significant}


def summarize(values: Sequence[float], seed: int = 0) -> Summary:
    """Summarize one metric's values over the prompts; none, or one that isn't finite, is a MetricError."""
    data = _checked(values)
    low, high = bootstrap_mean(data, seed=seed)
    return Summary(
        mean=math.fsum(data.tolist()) / data.size,
        std=float(data.std(ddof=1)) if data.size > 1 else 0.0,
        min=float(data.min()),
        max=float(data.max()),
        ci95_low=low,
        ci95_high=high,
    )


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, higher_is_better: bool = True
) -> PairedDifference:
    """Compare a metric's values prompt by prompt; `before[i]` and `after[i]` belong to the same prompt and seed."""
    if len(before) != len(after):
        raise MetricError(f"paired values must have equal length, got {len(before)} before and {len(after)} after")
    differences = _checked(after) - _checked(before)
    low, high = bootstrap_mean(differences)
    rose, fell = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(
        mean=math.fsum(differences.tolist()) / differences.size,
        ci95_low=low,
        ci95_high=high,
        better=rose if higher_is_better else fell,
        worse=fell if higher_is_better else rose,
        equal=differences.size - rose - fell,
        differences=tuple(differences.tolist()),
    )


def interval_caveat(num_values: int) -> str | None:
    """Warning that there are too few values for a 95% interval; None where there are enough."""
    if num_values >= MIN_FOR_INTERVAL:
        return None
    few = "1 prompt is" if num_values == 1 else f"{num_values} prompts are"
    return f"{few} too few for a reliable 95% interval; use at least {MIN_FOR_INTERVAL}"


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean (Efron 1979): prompts are drawn with replacement."""
    data = _checked(values)
    if resamples < 1:
        raise MetricError(f"resamples must be at least 1, got {resamples}")
    if data.size == 1:
        return float(data[0]), float(data[0])
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _SLAB // data.size)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        means[start : start + rows] = data[generator.integers(data.size, size=(rows, data.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _checked(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise MetricError(f"statistics need a list of at least one value, got shape {data.shape}")
    if not np.isfinite(data).all():
        wrong = data[~np.isfinite(data)][0]
        raise MetricError(f"statistics need finite values, got {wrong}; leave failed prompts out")
    return data
