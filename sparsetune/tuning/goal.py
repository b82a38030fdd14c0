"""What trials that meet the gate compete in."""

from collections.abc import Mapping, Sequence
from typing import Literal

from sparsetune.config.models import Goal
from sparsetune.tuning.events import TrialResult

_DB_PER_SPARSITY = 20.0


def directions(goal: Goal) -> list[Literal["minimize", "maximize"]]:
    """Say for each of a goal's objectives whether Optuna maximises or minimises it."""
    if goal == "pareto":
        return ["maximize", "maximize"]
    return ["minimize"] if goal == "speed" else ["maximize"]


def values(goal: Goal, trial: TrialResult, penalised: bool = False) -> float | tuple[float, float]:
    """Give a trial's value: mean sparsity, mean seconds of a rendering, or sparsity and PSNR.

    Args:
        goal: what trials compete in.
        trial: one that rendered at least one prompt.
        penalised: for samplers that know no constraints: what misses the gate pays for every dB, so that no trial
            gains by it.
    """
    sparsity, psnr = trial.sparsity or 0.0, trial.psnr or 0.0
    missing = max((max(0.0, shortfall) for shortfall in trial.shortfalls.values()), default=0.0) if penalised else 0.0
    if goal == "pareto":
        return sparsity, psnr
    if goal == "speed":
        return (trial.seconds_sparse or 0.0) * (1.0 + missing / _DB_PER_SPARSITY)
    return sparsity - missing / _DB_PER_SPARSITY


def winner(goal: Goal, trials: Sequence[TrialResult]) -> TrialResult | None:
    """Pick the best trial that met the gate; None where none did, or only with no sparsity at all.

    Of a Pareto search that is the sparsest, since the gate says what quality is needed.
    """
    passed = [trial for trial in trials if trial.feasible and trial.sparsity]
    if goal == "speed":
        return min(passed, key=lambda trial: trial.seconds_sparse or float("inf"), default=None)
    return max(passed, key=lambda trial: trial.sparsity or 0.0, default=None)


def closest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Pick the sparse trial that misses the gate by the least, one that rendered all prompts where there is one."""
    sparse = [trial for trial in trials if trial.state != "failed" and trial.sparsity and trial.shortfalls]
    complete = [trial for trial in sparse if trial.state == "complete"]
    return min(complete or sparse, key=lambda trial: largest_shortfall(trial.shortfalls), default=None)


def largest_shortfall(shortfalls: Mapping[str, float]) -> float:
    """Say by how many dB the bound that is missed most is missed, a hundredth of frame_cosine like one dB."""
    return max(missing * (100 if name == "frame_cosine" else 1) for name, missing in shortfalls.items())


def pareto_front(trials: Sequence[TrialResult]) -> tuple[TrialResult, ...]:
    """Give the complete trials that no other beats in both sparsity and PSNR, sparsest first."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.sparsity is not None]
    ranked = sorted(complete, key=lambda trial: (-(trial.sparsity or 0.0), -(trial.psnr or 0.0), trial.number))
    front: list[TrialResult] = []
    for trial in ranked:
        if not front or (trial.psnr or 0.0) > (front[-1].psnr or 0.0):
            front.append(trial)
    return tuple(front)
