"""Hand-set thresholds: one pair for all heads, rendered on one prompt beside a tuned policy."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from sparsetune.attention.policy import Policy
from sparsetune.attention.thresholds import HeadThresholds
from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import HandSetPoint, HandSetSection, PromptRow
from sparsetune.metrics import Gate

_LOG = logging.getLogger(__name__)

_DB_PER_DOUBLING = 6.0
"""Loss of PSNR where twice as much attention is dropped and the error doubles."""

_SLACK_DB = 0.5
"""Aim above the gate's PSNR, so that one rendering mostly meets it; more than twice as much is tried once more."""

_MAX_CDF = 0.9999


class Pair(NamedTuple):
    """One pair of thresholds for all heads, and the sparsity in [0, 1] that calibration predicts of it."""

    simthreshd1: float
    cdfthreshd: float
    sparsity: float


Render = Callable[[Policy], PromptResult]
"""Renders and measures one prompt under a policy."""


def measure_hand_set(
    policy: Policy, row: PromptRow, saved: float, pairs: Sequence[Pair], gate: Gate, render: Render
) -> HandSetSection | None:
    """Render one prompt with the pair that saves as much attention as a tuned policy, then at the gate's PSNR.

    Three renderings at most. `saved` is the fraction of attention that the tuned policy doesn't compute; `pairs` are
    of one simthreshd1, in order of sparsity. None where a prompt can't be rendered.
    """
    simthreshd1, points = pairs[0].simthreshd1, list[tuple[float, HandSetPoint]]()

    def measure(doublings: float) -> None:
        doublings = min(max(doublings, math.log2(1.0 - _MAX_CDF)), 0.0)
        pair = HeadThresholds(simthreshd1, cdfthreshd=1.0 - 2.0**doublings)
        points.append((doublings, _point(pair, render(_uniform(policy, pair)), gate)))

    dropped = [math.log2(1.0 - min(pair.cdfthreshd, _MAX_CDF)) for pair in pairs]
    wanted, slope = gate.min_psnr + _SLACK_DB, _DB_PER_DOUBLING
    try:
        measure(float(np.interp(saved, [pair.sparsity for pair in pairs], dropped)))
        while len(points) < 3 and not _is_at(points[-1][1], wanted):
            doublings, point = points[-1]
            measure(doublings + (point.psnr - wanted) / slope)
            (first, before), (second, after) = points[-2:]
            if first == second:
                break
            slope = min(max((before.psnr - after.psnr) / (second - first), 1.0), 2 * _DB_PER_DOUBLING)
    except OutOfMemoryError:
        raise
    except GenerationError as error:
        _LOG.warning("no comparison with hand-set thresholds: %s", error)
        return None
    return HandSetSection(prompt=row.index, points=tuple(point for _, point in points))


def nearest_to_mean(rows: Sequence[PromptRow]) -> PromptRow | None:
    """The prompt whose PSNR is nearest to the mean."""
    known = [row for row in rows if row.psnr is not None]
    mean = sum(row.psnr or 0.0 for row in known) / max(1, len(known))
    return min(known, key=lambda row: abs((row.psnr or 0.0) - mean), default=None)


def _is_at(point: HandSetPoint, wanted: float) -> bool:
    return point.meets_gate and point.psnr < wanted + 2 * _SLACK_DB


def _uniform(policy: Policy, pair: HeadThresholds) -> Policy:
    """All heads alike and no schedule, token order or cache; the text rule is the tuned policy's."""
    layers = [(layer.name, len(layer.heads)) for layer in policy.layers]
    uniform = Policy.uniform(layers, pair, keep_text=policy.keep_text)
    return replace(uniform, select_partial=policy.select_partial)


def _point(pair: HeadThresholds, result: PromptResult, gate: Gate) -> HandSetPoint:
    return HandSetPoint(
        simthreshd1=pair.simthreshd1,
        cdfthreshd=pair.cdfthreshd or 0.0,
        sparsity=min(max(result.sparsity or 0.0, 0.0), 1.0),
        psnr=result.metrics["psnr"],
        frame_cosine=result.metrics["frame_cosine"],
        speedup=result.speedup,
        meets_gate=gate.check([result.metrics]).passed,
    )
