"""Statistics over prompts: summaries, paired differences and non-inferiority, with Student's t.

Per-prompt values are taken as a sample of the prompts to come. Intervals and tests use Student's t, which holds its 95%
for normal and for heavy-tailed values from two prompts on, where percentile and BCa bootstrap cover 80 to 90% of few
prompts; skewed values need more prompts, and no method sees failures that are not in the sample, so the worst prompt
belongs beside every mean. tests/metrics/test_operating_characteristics.py simulates both.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsetune.errors import MetricError

LEVEL = 0.05
"""Significance level of every test, and what a 95% interval leaves out."""

POWER = 0.8
"""Probability with which `Inferiority.detectable` is detected, and an equal candidate passes with `needed` pairs."""

MIN_FOR_INTERVAL = 2
"""One value has no spread, and so no interval."""

FAILING = 0.1
"""Fraction of failing prompts that `interval_caveat` speaks of."""

_MAX_NEEDED = 100_000


@dataclass(frozen=True)
class Summary:
    """One metric over all prompts.

    `std` is the sample standard deviation (n - 1). `ci95_low` and `ci95_high` are the 95% interval of the mean by
    Student's t. All three are None for a single value. `min` and `max` show what no interval does: rare failures.
    """

    mean: float
    std: float | None
    min: float
    max: float
    ci95_low: float | None
    ci95_high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of a metric between two runs on the same prompts.

    `mean` is that of after - before, with its 95% interval and the two-sided p-value of the paired t test (None for a
    single pair); `worst` is the difference of the prompt that changed most for the worse. `better`, `worse` and `equal`
    count prompts in the metric's own direction.
    """

    mean: float
    ci95_low: float | None
    ci95_high: float | None
    p_value: float | None
    worst: float
    better: int
    worse: int
    equal: int
    differences: tuple[float, ...]

    @property
    def significant(self) -> bool:
        """Whether the mean differs from 0 at 5%, for this metric alone; see `holm` for several at once."""
        return self.p_value is not None and self.p_value < LEVEL

    def to_dict(self) -> dict[str, float | bool | list[float] | None]:
        """The fields and `significant` as a JSON object."""
        return {**asdict(self), "differences": list(self.differences), "significant": self.significant}


@dataclass(frozen=True)
class Inferiority:
    """One-sided paired t test of non-inferiority, from candidate - reference, higher being better.

    Args:
        mean: of the differences.
        std: their standard deviation; the typical one for a single pair.
        low, high: one-sided 95% bounds of the mean; None for a single pair.
        worst: the lowest difference.
        margin: the loss that is accepted.
        num_pairs: prompts compared.
    """

    mean: float
    std: float
    low: float | None
    high: float | None
    worst: float
    margin: float
    num_pairs: int

    @property
    def detectable(self) -> float | None:
        """Loss that this number of pairs detects with probability `POWER`; None for a single pair."""
        return None if self.low is None else _effect(self.num_pairs) * self.std

    @property
    def needed(self) -> int:
        """Pairs with which an equal candidate is shown to be no worse with probability `POWER`."""
        return needed_pairs(self.std, self.margin)

    @property
    def verdict(self) -> Literal["no worse", "worse", "unclear"]:
        """`no worse` if the loss is shown to be under the margin, `worse` if over it; else there are too few pairs."""
        if self.low is None or self.high is None:
            return "unclear"
        if self.low > -self.margin:
            return "no worse"
        return "worse" if self.high < -self.margin else "unclear"


def summarize(values: Sequence[float]) -> Summary:
    """Summarize one metric's values over the prompts; none, or one that isn't finite, is a MetricError."""
    data = _checked(values)
    interval = mean_interval(data)
    return Summary(
        mean=math.fsum(data.tolist()) / data.size,
        std=None if interval is None else float(data.std(ddof=1)),
        min=float(data.min()),
        max=float(data.max()),
        ci95_low=None if interval is None else interval[0],
        ci95_high=None if interval is None else interval[1],
    )


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.float64], level: float = LEVEL
) -> tuple[float, float] | None:
    """Two-sided 1 - `level` interval of the mean by Student's t; None below two values."""
    data = _checked(values)
    if data.size < MIN_FOR_INTERVAL:
        return None
    mean = math.fsum(data.tolist()) / data.size
    half = _quantile(1.0 - level / 2.0, data.size) * _standard_error(data)
    return mean - half, mean + half


def relative_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean over the mean; None below two values."""
    data = _checked(values) if len(values) >= MIN_FOR_INTERVAL else None
    return None if data is None else _standard_error(data) / float(data.mean())


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, higher_is_better: bool = True
) -> PairedDifference:
    """Compare a metric's values prompt by prompt; `before[i]` and `after[i]` belong to the same prompt and seed."""
    if len(before) != len(after):
        raise MetricError(f"paired values must have equal length, got {len(before)} before and {len(after)} after")
    differences = _checked(after) - _checked(before)
    interval = mean_interval(differences)
    rose, fell = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(
        mean=math.fsum(differences.tolist()) / differences.size,
        ci95_low=None if interval is None else interval[0],
        ci95_high=None if interval is None else interval[1],
        p_value=_p_value(differences),
        worst=float(differences.min() if higher_is_better else differences.max()),
        better=rose if higher_is_better else fell,
        worse=fell if higher_is_better else rose,
        equal=differences.size - rose - fell,
        differences=tuple(differences.tolist()),
    )


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Correct p-values of several tests (Holm 1979): at 5%, the chance of any false alarm stays at most 5%.

    None stays None and isn't counted. Dependent tests need no assumption; the more they agree, the rarer are alarms.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return tuple(corrected)


def inferiority(differences: Sequence[float], margin: float, *, typical_std: float) -> Inferiority:
    """Test whether a candidate is no worse than a reference by more than `margin`, at 5%.

    Args:
        differences: candidate - reference, prompt by prompt, higher being better.
        margin: the mean loss that is accepted, above 0.
        typical_std: standard deviation of the differences that `needed` assumes where a single pair has none.
    """
    data = _checked(differences)
    if margin <= 0.0:
        raise MetricError(f"margin must be greater than 0, got {margin:g}")
    interval = mean_interval(data, level=2.0 * LEVEL)
    return Inferiority(
        mean=math.fsum(data.tolist()) / data.size,
        std=typical_std if interval is None else float(data.std(ddof=1)),
        low=None if interval is None else interval[0],
        high=None if interval is None else interval[1],
        worst=float(data.min()),
        margin=margin,
        num_pairs=data.size,
    )


def needed_pairs(std: float, margin: float) -> int:
    """Pairs with which an equal candidate passes `inferiority` with probability `POWER`, at most 100,000."""
    low, high = MIN_FOR_INTERVAL, _MAX_NEEDED  # the effect falls with the number of pairs
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _effect(middle) * std <= margin else (middle + 1, high)
    return low


def chance_of_none(num_values: int) -> float:
    """Probability that none of so many prompts is one of the `FAILING` fraction that fails."""
    return float((1.0 - FAILING) ** num_values)


def interval_caveat(num_values: int) -> str | None:
    """What an interval over so few values doesn't show; None where 19 of 20 such samples would."""
    if num_values < MIN_FOR_INTERVAL:
        return f"1 prompt has no interval; use at least {MIN_FOR_INTERVAL}" if num_values else None
    missed = chance_of_none(num_values)
    if missed < LEVEL:
        return None
    return (
        f"if 1 prompt in 10 fails, {num_values} prompts include none of those with probability {missed:.2f}, which no "
        "interval shows; look at the worst prompt"
    )


def _effect(num_pairs: int) -> float:
    """Mean difference, in standard deviations, that a one-sided paired t test at 5% detects with `POWER`."""
    return (_quantile(1.0 - LEVEL, num_pairs) + _quantile(POWER, num_pairs)) / math.sqrt(num_pairs)


def _quantile(probability: float, num_values: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(num_values - 1, probability))


def _p_value(differences: npt.NDArray[np.float64]) -> float | None:
    from scipy.special import stdtr

    if differences.size < MIN_FOR_INTERVAL:
        return None
    error, mean = _standard_error(differences), math.fsum(differences.tolist()) / differences.size
    if error == 0.0:
        return 0.0 if mean else 1.0
    return float(2.0 * stdtr(differences.size - 1, -abs(mean) / error))


def _standard_error(data: npt.NDArray[np.float64]) -> float:
    return float(data.std(ddof=1)) / math.sqrt(data.size)


def _checked(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise MetricError(f"statistics need a list of at least one value, got shape {data.shape}")
    if not np.isfinite(data).all():
        wrong = data[~np.isfinite(data)][0]
        raise MetricError(f"statistics need finite values, got {wrong}; leave failed prompts out")
    return data
