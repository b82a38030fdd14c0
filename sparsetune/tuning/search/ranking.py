"""What trials that meet the gate compete in."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from scipy.stats import spearmanr

from sparsetune.config.models import Goal
from sparsetune.tuning.events import SearchStatistics, TrialResult

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


_FEWEST = 4
"""Trials below which neither figure means anything."""


def insight(study: optuna.Study, trials: Sequence[TrialResult], goal: Goal) -> SearchStatistics:
    """Compute a search's rank correlation and its parameters' importances."""
    return SearchStatistics(rank_correlation(trials), importances(study, goal))


def rank_correlation(trials: Sequence[TrialResult]) -> float | None:
    """Spearman's rank correlation between calibrated error and PSNR over the complete trials that have both.

    None below four trials, or where one of the two doesn't vary.
    """
    pairs = [
        (trial.predicted_error, trial.psnr)
        for trial in trials
        if trial.state == "complete" and trial.predicted_error is not None and trial.psnr is not None
    ]
    if len(pairs) < _FEWEST or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def importances(study: optuna.Study, goal: Goal) -> dict[str, float]:
    """PED-ANOVA's importance of each parameter (Watanabe et al., IJCAI 2023), most important first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = {name for trial in complete for name in trial.params}
    varied = {name for name in varied if len({str(trial.params.get(name)) for trial in complete}) > 1}
    if len(complete) < _FEWEST or not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 2.0 / len(complete)))
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(varied), target=_first if goal == "pareto" else None
        )
    return {name: float(value) for name, value in found.items()}


def _first(trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.values[0])
