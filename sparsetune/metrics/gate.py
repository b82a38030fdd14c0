"""Quality gate: bounds on metrics that a result must meet before deployment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsetune.errors import MetricError
from sparsetune.metrics.frames import PSNR_CAP_DB, pooled_psnr

WORST_FRAME_METRIC = "psnr_frame_min"
POOLED = "pooled psnr"
"""Name of the condition on the PSNR of the prompts' mean squared error."""


@dataclass(frozen=True)
class Condition:
    """One bound and its measured value, which must be above it; `name` names both, e.g. `mean psnr`."""

    name: str
    unit: str
    measured: float
    bound: float
    met: bool

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        relation = ">" if self.met else "<="
        return f"{self.name} {_distinguishable(self.measured, self.bound)}{unit} {relation} {self.bound:g}{unit}"


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
    """Strict lower bounds that all must be met; the human review comes on top, when a checkpoint is promoted.

    Means are over the prompts whose two videos differ (`differing`), so that no identical pair lifts them.

    Args:
        min_frame_cosine: on the mean frame_cosine over prompts.
        min_psnr: in dB, on the mean psnr over prompts and on the pooled psnr, that of the prompts' mean squared error.
            The second is the stricter: a prompt at any PSNR lifts it by at most 10·log10(n / (n - 1)) dB.
        min_psnr_worst: on the worst prompt's psnr, in dB; None for no such bound.
        min_psnr_frame: on the worst frame's PSNR in any prompt, in dB; None for no such bound.
    """

    min_frame_cosine: float = 0.95
    min_psnr: float = 35.0
    min_psnr_worst: float | None = 28.0
    min_psnr_frame: float | None = None

    def __post_init__(self) -> None:
        for name, bound in asdict(self).items():
            if bound is not None and not math.isfinite(bound):
                raise MetricError(f"gate bound {name} must be a finite number, got {bound}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that `check` needs."""
        base = ("frame_cosine", "psnr")
        return base if self.min_psnr_frame is None else (*base, WORST_FRAME_METRIC)

    def check(self, rows: Sequence[Mapping[str, float]], num_failed: int = 0) -> GateResult:
        """Check the metrics of the prompts that rendered, one row each; none, or any failed prompt, fails the gate."""
        failures = []
        if num_failed:
            failures.append(f"{num_failed} of {num_failed + len(rows)} prompts failed to render")
        elif not rows:
            failures.append("no prompt was measured")
        conditions = self.conditions(rows) if rows else ()
        failures += [str(condition) for condition in conditions if not condition.met]
        return GateResult(not failures, tuple(failures), conditions, sum(map(_is_identical, rows)))

    def conditions(self, rows: Sequence[Mapping[str, float]]) -> tuple[Condition, ...]:
        """Measure every bound, over at least one row."""
        psnr = _column(rows, "psnr")
        judged = differing(rows)
        cosine, lossy = _column(judged, "frame_cosine"), _column(judged, "psnr")
        bounds = [
            ("mean frame_cosine", "", math.fsum(cosine) / len(cosine), self.min_frame_cosine),
            ("mean psnr", "dB", math.fsum(lossy) / len(lossy), self.min_psnr),
            (POOLED, "dB", pooled_psnr(lossy), self.min_psnr),
            ("worst prompt's psnr", "dB", min(psnr), self.min_psnr_worst),
        ]
        if self.min_psnr_frame is not None:
            bounds.append(("worst frame's psnr", "dB", min(_column(rows, WORST_FRAME_METRIC)), self.min_psnr_frame))
        return tuple(
            Condition(name, unit, measured, bound, measured > bound)
            for name, unit, measured, bound in bounds
            if bound is not None
        )


def differing(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The rows of prompts whose videos differ; all rows where none does."""
    return [row for row in rows if not _is_identical(row)] or rows


def _is_identical(row: Mapping[str, float]) -> bool:
    return row.get("psnr", 0.0) >= PSNR_CAP_DB


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    if any(name not in row for row in rows):
        raise MetricError(f"the gate needs {name} of every prompt; add {name} to the metrics")
    return [row[name] for row in rows]


def _distinguishable(measured: float, bound: float) -> str:
    """Format a value with as few decimals as show its side of the bound: 34.998 isn't printed as 35.00."""
    for decimals in (4, 6, 9) if abs(bound) <= 1 else (2, 4, 6, 9):
        text = f"{measured:.{decimals}f}"
        if (float(text) > bound) == (measured > bound):
            return text
    return repr(measured)
