"""Score out of 100 and its one-word verdict."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from sparsetune.errors import MetricError
from sparsetune.metrics.frames import pooled_psnr
from sparsetune.metrics.gate import differing

Verdict = Literal["excellent", "good", "acceptable", "degraded"]

COSINE_POINTS = ((0.98, 40), (0.95, 30), (0.90, 20))  # frame_cosine above the bound earns the points
PSNR_POINTS = ((40.0, 40), (35.0, 30), (30.0, 20))  # likewise psnr, in dB
L1_POINTS = ((0.02, 20), (0.05, 15), (0.10, 10))  # frame_l1 below the bound earns the points

VERDICTS: tuple[tuple[int, Verdict], ...] = ((95, "excellent"), (80, "good"), (60, "acceptable"))
"""The lowest score of each verdict; anything lower is degraded."""


def score(frame_cosine: float, psnr: float, frame_l1: float) -> int:
    """Score of one value of each, out of 100; every bound is strict (a value on it earns the lower step)."""
    for name, value in (("frame_cosine", frame_cosine), ("psnr", psnr), ("frame_l1", frame_l1)):
        if math.isnan(value):
            raise MetricError(f"cannot score: {name} is NaN; leave failed prompts out of the mean")
    return (
        next((points for bound, points in COSINE_POINTS if frame_cosine > bound), 0)
        + next((points for bound, points in PSNR_POINTS if psnr > bound), 0)
        + next((points for bound, points in L1_POINTS if frame_l1 < bound), 0)
    )


def psnr_grade(psnr: float) -> tuple[float | None, float | None]:
    """Bounds in dB of the range in which a psnr earns the same points; None where it has no such bound."""
    bounds = sorted(bound for bound, _ in PSNR_POINTS)
    below = max((bound for bound in bounds if psnr > bound), default=None)
    return below, next((bound for bound in bounds if psnr <= bound), None)


def score_prompts(rows: Sequence[Mapping[str, float]]) -> int:
    """Score over prompts, one row of metrics each: as the gate, of the pairs that differ, with their pooled psnr."""
    judged = differing(rows)
    cosine, l1 = (math.fsum(row[name] for row in judged) / len(judged) for name in ("frame_cosine", "frame_l1"))
    return score(cosine, pooled_psnr([row["psnr"] for row in judged]), l1)


def verdict(score: int) -> Verdict:
    """Return the verdict of a score in [0, 100]."""
    if not 0 <= score <= 100:
        raise MetricError(f"score must be in [0, 100], got {score}")
    return next((word for lowest, word in VERDICTS if score >= lowest), "degraded")
