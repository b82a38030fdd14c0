"""Quality gate: bounds on metrics that a result must meet before deployment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsetune.errors import MetricError
from sparsetune.metrics.frames import PSNR_CAP_DB, pooled_psnr
from sparsetune.metrics.registry import get

WORST_FRAME_METRIC = "psnr_frame_min"
POOLED = "pooled psnr"
"""Name of the condition on the PSNR of the prompts' mean squared error."""


@dataclass(frozen=True)
class Condition:
    """One bound and its measured value, which must be above it, or below a maximum.

    `name` is the statistic and its metric, e.g. `mean psnr`.
    """

    name: str
    unit: str
    measured: float
    bound: float
    met: bool
    is_maximum: bool = False

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        measured = _distinguishable(self.measured, self.bound)
        return f"{self.name} {measured}{unit} {relation(self.met, self.is_maximum)} {self.bound:g}{unit}"

    @property
    def shortfall(self) -> float:
        """By how much the value misses the bound, in the metric's unit; at most 0 where it meets it or is on it."""
        return self.measured - self.bound if self.is_maximum else self.bound - self.measured


def relation(met: bool, is_maximum: bool = False) -> str:
    """How a measured value relates to its bound, e.g. `>`."""
    return ("<" if met else ">=") if is_maximum else (">" if met else "<=")


def meets(measured: float, bound: float, is_maximum: bool = False) -> bool:
    """Whether a value is above its bound, or below a maximum."""
    return measured < bound if is_maximum else measured > bound


@dataclass(frozen=True)
class MetricBound:
    """A bound on the mean of a registered metric: a minimum, or a maximum where lower is better.

    An `optional` one holds only where the metric can be computed.
    """

    metric: str
    bound: float
    optional: bool = False

    @classmethod
    def parse(cls, text: str, higher_is_better: bool) -> "MetricBound":
        """Parse NAME=VALUE, or NAME?=VALUE for an optional bound.

        Raises:
            MetricError: it has another form, or the metric is unknown or has the other direction.
        """
        name, separator, value = text.partition("=")
        option, other = ("--gate-min", "--gate-max") if higher_is_better else ("--gate-max", "--gate-min")
        try:
            bound = float(value) if separator else math.nan
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise MetricError(f"{option} must be NAME=VALUE with a finite number, e.g. ssim=.9, got {text!r}")
        metric = get(name.strip().removesuffix("?"))
        if metric.higher_is_better != higher_is_better:
            better = "higher" if metric.higher_is_better else "lower"
            raise MetricError(f"{better} values of {metric.name} are better; bound it with {other} {text}")
        return cls(metric.name, bound, name.strip().endswith("?"))


def in_decibels(metric: str, difference: float) -> float:
    """Convert a difference of a metric to a scale where 1 is about as much as 1 dB of PSNR: .01 of those up to 1.

    Metrics in dB, and those up to 100 as VMAF, stay as they are.
    """
    one = get(metric)
    return difference if one.unit == "dB" or 1.0 < one.range[1] < math.inf else difference * 100.0


@dataclass(frozen=True)
class GateResult:
    """Whether the gate is passed, the failed conditions as text, every condition, and the prompts left out of means."""

    passed: bool
    failures: tuple[str, ...]
    conditions: tuple[Condition, ...]
    num_identical: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "conditions": [asdict(condition) for condition in self.conditions],
            "num_identical": self.num_identical,
        }


@dataclass(frozen=True)
class Gate:
    """Strict bounds that all must be met; the human review comes on top, when a checkpoint is promoted.

    Means are over the prompts whose two videos differ (`differing`), so that no identical pair lifts them.

    Args:
        min_frame_cosine: on the mean frame_cosine over prompts.
        min_psnr: in dB, on the mean psnr over prompts and on the pooled psnr, that of the prompts' mean squared error.
            The second is the stricter: a prompt at any PSNR lifts it by at most 10·log10(n / (n - 1)) dB.
        min_psnr_worst: on the worst prompt's psnr, in dB; None for no such bound.
        min_psnr_frame: on the worst frame's PSNR in any prompt, in dB; None for no such bound.
        min_metrics: on means of other metrics, as `ssim=.9`; see `MetricBound.parse`.
        max_metrics: upper bounds likewise, of metrics where lower is better, as `lpips=.1`.

    Raises:
        MetricError: a bound isn't finite, or is of an unknown metric or one of the other direction.
    """

    min_frame_cosine: float = 0.95
    min_psnr: float = 35.0
    min_psnr_worst: float | None = 28.0
    min_psnr_frame: float | None = None
    min_metrics: tuple[str, ...] = ()
    max_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, bound in asdict(self).items():
            if isinstance(bound, float) and not math.isfinite(bound):
                raise MetricError(f"gate bound {name} must be a finite number, got {bound}")
        _ = self.minima, self.maxima

    @property
    def minima(self) -> tuple[MetricBound, ...]:
        """`min_metrics`, parsed."""
        return tuple(MetricBound.parse(text, higher_is_better=True) for text in self.min_metrics)

    @property
    def maxima(self) -> tuple[MetricBound, ...]:
        """`max_metrics`, parsed."""
        return tuple(MetricBound.parse(text, higher_is_better=False) for text in self.max_metrics)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that `check` uses."""
        frame = () if self.min_psnr_frame is None else (WORST_FRAME_METRIC,)
        return ("frame_cosine", "psnr", *frame, *(one.metric for one in (*self.minima, *self.maxima)))

    def with_margin(self, margin_db: float) -> "Gate":
        """Make all bounds but that on frame_cosine stricter by a margin in dB; see `in_decibels` for other metrics."""

        def raised(bound: float | None) -> float | None:
            return None if bound is None else bound + margin_db

        def shifted(one: MetricBound, sign: int) -> str:
            margin = margin_db / in_decibels(one.metric, 1.0)
            return f"{one.metric}{'?' if one.optional else ''}={one.bound + sign * margin:.6g}"

        return replace(
            self,
            min_psnr=self.min_psnr + margin_db,
            min_psnr_worst=raised(self.min_psnr_worst),
            min_psnr_frame=raised(self.min_psnr_frame),
            min_metrics=tuple(shifted(one, 1) for one in self.minima),
            max_metrics=tuple(shifted(one, -1) for one in self.maxima),
        )

    def check(self, rows: Sequence[Mapping[str, float]], num_failed: int = 0) -> GateResult:
        """Check the metrics of the prompts that rendered, one row each; none, or any failed prompt, fails the gate."""
        failures = []
        if num_failed:
            failures.append(f"{num_failed} of {num_failed + len(rows)} prompts failed to render")
        elif not rows:
            failures.append("no prompt was measured")
        missing = self._missing(rows)
        failures += [f"{name} could not be computed for every prompt" for name in missing]
        conditions = self.conditions(rows) if rows and not missing else ()
        failures += [str(condition) for condition in conditions if not condition.met]
        return GateResult(not failures, tuple(failures), conditions, sum(map(_is_identical, rows)))

    def conditions(self, rows: Sequence[Mapping[str, float]]) -> tuple[Condition, ...]:
        """Measure every bound, over at least one row.

        Raises:
            MetricError: a row lacks a metric of a bound that isn't optional.
        """
        for name in self._missing(rows):
            raise MetricError(
                f"the gate needs {name} of every prompt, but it could not be computed; bound another metric"
            )
        judged = differing(rows)
        lossy = _column(judged, "psnr")
        bounds = [
            ("mean frame_cosine", "", _mean(_column(judged, "frame_cosine")), self.min_frame_cosine),
            ("mean psnr", "dB", _mean(lossy), self.min_psnr),
            (POOLED, "dB", pooled_psnr(lossy), self.min_psnr),
            ("worst prompt's psnr", "dB", min(_column(rows, "psnr")), self.min_psnr_worst),
        ]
        if self.min_psnr_frame is not None:
            bounds.append(("worst frame's psnr", "dB", min(_column(rows, WORST_FRAME_METRIC)), self.min_psnr_frame))
        fixed = [
            Condition(name, unit, measured, bound, meets(measured, bound))
            for name, unit, measured, bound in bounds
            if bound is not None
        ]
        minima = [_of_metric(judged, one) for one in self.minima if _has(rows, one.metric)]
        maxima = [_of_metric(judged, one, is_maximum=True) for one in self.maxima if _has(rows, one.metric)]
        return (*fixed, *minima, *maxima)

    def _missing(self, rows: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
        optional = {one.metric for one in (*self.minima, *self.maxima) if one.optional}
        return tuple(name for name in self.metrics if name not in optional and not _has(rows, name))


def differing(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The rows of prompts whose videos differ; all rows where none does."""
    return [row for row in rows if not _is_identical(row)] or rows


def _is_identical(row: Mapping[str, float]) -> bool:
    return row.get("psnr", 0.0) >= PSNR_CAP_DB


def _has(rows: Sequence[Mapping[str, float]], name: str) -> bool:
    return all(name in row for row in rows)


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _of_metric(rows: Sequence[Mapping[str, float]], one: MetricBound, is_maximum: bool = False) -> Condition:
    measured = _mean(_column(rows, one.metric))
    met = meets(measured, one.bound, is_maximum)
    return Condition(f"mean {one.metric}", get(one.metric).unit, measured, one.bound, met, is_maximum)


def _distinguishable(measured: float, bound: float) -> str:
    """Format a value with as few decimals as show its side of the bound: 34.998 isn't printed as 35.00."""
    for decimals in (4, 6, 9) if abs(bound) <= 1 else (2, 4, 6, 9):
        text = f"{measured:.{decimals}f}"
        if (float(text) > bound, float(text) < bound) == (measured > bound, measured < bound):
            return text
    return repr(measured)
