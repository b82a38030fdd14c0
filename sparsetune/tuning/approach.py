"""The straight way to the gate along one budget for all layers, before the sampler looks around."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_TRIALS = 4
"""Trials that the way may take beyond those that the search begins with."""

CLOSE = 1.05
"""Budgets within about this factor are the same: their videos differ by no more than prompts' noise."""

STRIDE = 2.0
"""Factor to step by while only budgets that hold, or only ones that fail, are known."""

_NOISE_DB = 0.7
"""Standard error of a trial's mean PSNR on the demo model: nearer to the gate than this, trials weigh alike."""


@dataclass(frozen=True)
class Tried:
    """A budget that was tried for all layers, and by how many dB its videos are above the gate (below 0: miss it)."""

    budget: float
    excess_db: float


def next_budget(tried: Sequence[Tried], lowest: float, highest: float) -> float | None:
    """Say which budget to try next, or None where the one that just meets the gate is known.

    PSNR falls about linearly with the logarithm of the budget, plus noise of the prompts, so the crossing is that of
    a straight line through the trials: one that misses by chance doesn't mislead it as it would a bisection.

    Args:
        tried: what was tried so far; None of it gives None.
        lowest: least budget of the search space.
        highest: greatest budget of the search space.
    """
    if not tried:
        return None
    known, held = [each.budget for each in tried], [each.budget for each in tried if each.excess_db >= 0]
    if not held or max(held) == max(known):
        wanted = max(known) * STRIDE if held else min(known) / STRIDE
        wanted = min(max(wanted, lowest), highest)
        return None if wanted in known else wanted
    crossing = _crossing(tried)
    for wanted in (crossing, crossing / CLOSE, crossing / CLOSE**2):  # lower where that one missed
        if max(held) * math.sqrt(CLOSE) > wanted:
            return None
        if all(abs(math.log(wanted / budget)) > math.log(CLOSE) / 2 for budget in known):
            return wanted
    return None


def _crossing(tried: Sequence[Tried]) -> float:
    """Where the line through the trials meets the gate, those near to it weighing most."""
    budget, excess = np.log([each.budget for each in tried]), np.array([each.excess_db for each in tried])
    slope, offset = np.polyfit(budget, excess, 1, w=1.0 / (_NOISE_DB + np.abs(excess)))
    if slope >= 0:  # noise alone: the middle of what is known
        return math.exp(budget.mean())
    return math.exp(np.clip(-offset / slope, budget.min(), budget.max()))
