"""Bisection along one budget for all layers: the straight way to the gate, before the sampler looks around."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_TRIALS = 5
"""Trials that bisection may take; each halves the logarithm of the range, which begins at a factor of `STRIDE`."""

CLOSE = 1.04
"""Bisection ends where the smallest budget that fails is within this factor of the largest that holds."""

STRIDE = 2.0
"""Factor to step by while only budgets that hold, or only ones that fail, are known."""


@dataclass(frozen=True)
class Tried:
    """A budget that was tried for all layers, without dense steps, and whether its videos met the gate."""

    budget: float
    feasible: bool


def next_budget(tried: Sequence[Tried], lowest: float, highest: float) -> float | None:
    """Say which budget to try next, or None where bisection is done.

    A larger budget gives more sparsity and, prompts' noise aside, less PSNR, so the best budget lies between the
    largest that holds and the smallest above it that fails.

    Args:
        tried: what was tried so far; None of it gives None.
        lowest: least budget of the search space.
        highest: greatest budget of the search space.
    """
    held = max((each.budget for each in tried if each.feasible), default=None)
    failed = min((each.budget for each in tried if not each.feasible and each.budget > (held or 0.0)), default=None)
    if held is None and failed is None:
        return None
    if held is None or failed is None:
        known = failed if held is None else held
        if known is None or known in (lowest, highest):
            return None
        stepped = known / STRIDE if held is None else known * STRIDE
        return min(max(stepped, lowest), highest)
    return math.sqrt(held * failed) if failed / held > CLOSE else None
