"""Statistics of a metric over prompts: summaries and paired differences, each with a bootstrap interval.

Pure: the same values and seed give the same figures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError

RESAMPLES = 10_000
"""Bootstrap resamples: the interval's ends then move by under a hundredth of its width from seed to seed."""

MIN_FOR_INTERVAL = 6
"""With fewer prompts an interval says little: five differences all have one sign by luck alone in 2 / 2**5 > 5 %."""

_SLAB = 1 << 20  # resampled values held at a time


@dataclass(frozen=True)
class Summary:
    """One metric over all prompts.

    `std` is the sample's standard deviation (n - 1; 0.0 for a single value). `ci95_low` and `ci95_high` bound
    the mean: the 95 % percentile bootstrap interval. Over a single value it is that value, which says nothing
    about other prompts.
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
    """How a metric moved from one run to another on the same prompts.

    `mean` is that of after - before, with its 95 % bootstrap interval; `better`, `worse` and `equal` count
    prompts, in the metric's own direction. `significant` says that the interval leaves out 0 over at
    least `MIN_FOR_INTERVAL` prompts.
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
        """Whether 0 lies outside the interval, and there are prompts enough for that to mean something."""
        enough = len(self.differences) >= MIN_FOR_INTERVAL
        return enough and (self.ci95_low > 0.0 or self.ci95_high < 0.0)

    def to_dict(self) -> dict[str, float | bool | list[float]]:
        """The fields and `significant` as a JSON object."""
        return {**asdict(self), "differences": list(self.differences), "significant": self.significant}


def summarize(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """Summarise one metric's values over the prompts.

    Raises:
        MetricError: there is no value, or one isn't finite.
    """
    data = _checked(values)
    low, high = bootstrap_mean(data, seed=seed, resamples=resamples)
    return Summary(
        mean=_mean(data),
        std=float(data.std(ddof=1)) if data.size > 1 else 0.0,
        min=float(data.min()),
        max=float(data.max()),
        ci95_low=low,
        ci95_high=high,
    )


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    *,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Compare a metric's values prompt by prompt; `before[i]` and `after[i]` belong to the same prompt and seed.

    Raises:
        MetricError: the two have different lengths, there is no pair, or a value isn't finite.
    """
    if len(before) != len(after):
        raise MetricError(
            f"paired values must be equally many, but there are {len(before)} before and {len(after)} after; "
            "compare the prompts that both runs have"
        )
    differences = _checked(after) - _checked(before)
    low, high = bootstrap_mean(differences, seed=seed, resamples=resamples)
    rose, fell = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(
        mean=_mean(differences),
        ci95_low=low,
        ci95_high=high,
        better=rose if higher_is_better else fell,
        worse=fell if higher_is_better else rose,
        equal=differences.size - rose - fell,
        differences=tuple(differences.tolist()),
    )


def interval_caveat(num_values: int) -> str | None:
    """Return the warning that an interval over so few values is unreliable; None if there are enough."""
    if num_values >= MIN_FOR_INTERVAL:
        return None
    prompts = "1 prompt is" if num_values == 1 else f"{num_values} prompts are"
    return f"{prompts} too few for a reliable 95% interval; use at least {MIN_FOR_INTERVAL}"


def bootstrap_mean(
    values: Sequence[float] | npt.NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979): prompts are drawn with replacement.

    Raises:
        MetricError: there is no value, one isn't finite, or `resamples` is below 1.
    """
    data = _checked(values)
    if resamples < 1:
        raise MetricError(f"resamples must be at least 1, but is {resamples}; give {RESAMPLES} or more")
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


def _mean(data: npt.NDArray[np.float64]) -> float:
    return math.fsum(data.tolist()) / data.size


def _checked(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise MetricError(f"statistics need a list of at least one value, but got shape {data.shape}; measure a prompt")
    if not np.isfinite(data).all():
        wrong = data[~np.isfinite(data)][0]
        raise MetricError(f"statistics need finite values, but one is {wrong}; leave failed prompts out and count them")
    return data
