"""What the trials of a search say of the search itself."""

import warnings
from collections.abc import Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from scipy.stats import spearmanr

from sparsetune.config.models import Goal
from sparsetune.tuning.events import Insight, TrialResult

_FEWEST = 4
"""Trials below which neither figure means anything."""


def insight(study: optuna.Study, trials: Sequence[TrialResult], goal: Goal) -> Insight:
    """Compute a search's rank correlation and its parameters' importances."""
    return Insight(rank_correlation(trials), importances(study, goal))


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
