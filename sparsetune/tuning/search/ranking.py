"""Values of trials: by how much they miss the gate, which one is best, and statistics over all of them."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from scipy.stats import spearmanr

from sparsetune.config.models import Goal
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.metrics import Gate
from sparsetune.metrics.gate import in_decibels
from sparsetune.tuning.events import SearchStatistics, TrialResult

_DB_PER_SPARSITY = 20.0


def directions(goal: Goal) -> list[Literal["minimize", "maximize"]]:
    if goal == "pareto":
        return ["maximize", "maximize"]
    return ["minimize"] if goal == "speed" else ["maximize"]


def values(goal: Goal, trial: TrialResult, penalised: bool = False) -> float | tuple[float, float]:
    """Return a trial's value: mean sparsity, its seconds (see `TrialResult.cost`), or sparsity and PSNR.

    With `penalised`, for samplers without constraints, every dB that misses the gate makes the value worse.
    """
    sparsity, psnr = trial.sparsity or 0.0, trial.psnr or 0.0
    missing = max(0.0, largest_shortfall(trial.shortfalls)) if penalised and trial.shortfalls else 0.0
    if goal == "pareto":
        return sparsity, psnr
    if goal == "speed":
        return trial.cost * (1.0 + missing / _DB_PER_SPARSITY)
    return sparsity - missing / _DB_PER_SPARSITY


def shortfalls(results: Sequence[PromptResult], gate: Gate) -> dict[str, float]:
    """Return by how much results miss each condition of the gate, by its name; at most 0 where it is met.

    Strict bounds (`above`) become ≤ constraints: a metric exactly at its bound meets it.
    """
    if not results:
        return {"mean psnr": math.inf}
    return {one.name: one.shortfall for one in gate.conditions([result.metrics for result in results])}


def mean(results: Sequence[PromptResult], metric: str) -> float:
    return sum(result.metrics[metric] for result in results) / len(results)


def mean_sparsity(results: Sequence[PromptResult]) -> float:
    return sum(result.sparsity or 0.0 for result in results) / len(results)


def winner(goal: Goal, trials: Sequence[TrialResult]) -> TrialResult | None:
    """Return the best trial that met the gate and left something out, of a Pareto search the sparsest.

    Where speed is the goal, a trial that isn't faster than dense by more than the noise can't win.
    """
    passed = [trial for trial in trials if trial.feasible and trial.saves]
    if goal == "speed":
        passed = [trial for trial in passed if trial.is_faster]
        return min(passed, key=lambda trial: trial.cost or float("inf"), default=None)
    return max(passed, key=lambda trial: trial.sparsity or 0.0, default=None)


def closest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Return the sparse trial that misses the gate by the least; complete trials are preferred to pruned ones."""
    sparse = [trial for trial in trials if trial.state != "failed" and trial.saves and trial.shortfalls]
    complete = [trial for trial in sparse if trial.state == "complete"]
    return min(complete or sparse, key=lambda trial: largest_shortfall(trial.shortfalls), default=None)


def leaders(goal: Goal, trials: Sequence[TrialResult], count: int) -> tuple[TrialResult, ...]:
    """Return the best trials, the winner first, after those that could win the ones closest to the gate."""
    left, found = list(trials), list[TrialResult]()
    while len(found) < count and (best := winner(goal, left) or closest(left)) is not None:
        found.append(best)
        left = [trial for trial in left if trial.number != best.number]
    return tuple(found)


def largest_shortfall(shortfalls: Mapping[str, float]) -> float:
    """Return the largest shortfall in dB, by `in_decibels`; the last word of each name is the metric."""
    return max(in_decibels(name.rpartition(" ")[2], missing) for name, missing in shortfalls.items())


def pareto_front(trials: Sequence[TrialResult]) -> tuple[TrialResult, ...]:
    """Return the complete trials that no other beats in both sparsity and PSNR, sparsest first."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.sparsity is not None]
    ranked = sorted(complete, key=lambda trial: (-(trial.sparsity or 0.0), -(trial.psnr or 0.0), trial.number))
    front: list[TrialResult] = []
    for trial in ranked:
        if not front or (trial.psnr or 0.0) > (front[-1].psnr or 0.0):
            front.append(trial)
    return tuple(front)


_MIN_TRIALS = 4
"""With fewer trials neither statistic means anything."""


def search_statistics(study: optuna.Study, goal: Goal, trials: Sequence[TrialResult]) -> SearchStatistics:
    """Compare what was predicted of the complete trials with what was measured; see `SearchStatistics`."""
    complete = [trial for trial in trials if trial.state == "complete"]
    timed = [
        (trial.predicted_seconds, trial.seconds_sparse)
        for trial in complete
        if trial.predicted_seconds and trial.seconds_sparse and trial.seconds_dense
    ]
    errors = [abs(predicted - measured) / measured for predicted, measured in timed]
    return SearchStatistics(
        rank_correlation=rank_correlation([(trial.predicted_error, trial.psnr) for trial in complete]),
        importances=importances(study, goal),
        seconds_correlation=rank_correlation(timed),
        seconds_error=statistics.mean(errors) if errors else None,
    )


def rank_correlation(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Spearman's rank correlation over the pairs that have both figures.

    None below four of them, or where one of the two doesn't vary.
    """
    known = [pair for pair in pairs if None not in pair]
    if len(known) < _MIN_TRIALS or any(len(set(column)) == 1 for column in zip(*known, strict=True)):
        return None
    return float(spearmanr(*zip(*known, strict=True)).statistic)


def importances(study: optuna.Study, goal: Goal) -> dict[str, float]:
    """PED-ANOVA's importance of each parameter (Watanabe et al., IJCAI 2023), most important first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = {name for trial in complete for name in trial.params}
    varied = {name for name in varied if len({str(trial.params.get(name)) for trial in complete}) > 1}
    if len(complete) < _MIN_TRIALS or not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Some regimes")  # parameters of a cache that few trials have
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 2.0 / len(complete)))
        target = (lambda trial: float(trial.values[0])) if goal == "pareto" else None
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(varied), target=target
        )
    return {name: float(value) for name, value in found.items()}
