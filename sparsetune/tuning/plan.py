"""What a study tries before its sampler is asked: the first trials, then a bisection along one budget."""

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsetune.metrics import Gate
from sparsetune.tuning.bisect import NUM_TRIALS, Tried, next_budget
from sparsetune.tuning.shared import OUTCOME, PARAMS, SharedStudy
from sparsetune.tuning.space import BUDGETS, CALIBRATED, THRESHOLDS, SearchSpace

_START = "start"
_BISECTION = "bisection"


def plan(study: SharedStudy, trials: list[FrozenTrial], space: SearchSpace, gate: Gate) -> None:
    """Put in the queue what should be tried next, unless something waits there; called in the study's turn.

    Args:
        study: the study.
        trials: all that it has.
        space: what is searched.
        gate: what trials must meet.
    """
    has_starts = not trials or any(_START in trial.user_attrs for trial in trials)
    if has_starts and _enqueue_starts(study, space, trials):
        return
    if not isinstance(study.sampler, optuna.samplers.RandomSampler):  # who asks for random trials gets them
        _enqueue_bisection(study, space, gate, trials)


def _enqueue_starts(study: SharedStudy, space: SearchSpace, trials: list[FrozenTrial]) -> bool:
    """Enqueue the first trials, as far as a process that died on it hasn't; gives whether there were any."""
    known = {trial.user_attrs.get(_START) for trial in trials}
    missing = [(index, start) for index, start in enumerate(space.warm_start()) if index not in known]
    for index, start in missing:
        study.put(start.params, **{THRESHOLDS: start.thresholds, _START: index})
    return bool(missing)


def _enqueue_bisection(study: SharedStudy, space: SearchSpace, gate: Gate, trials: list[FrozenTrial]) -> None:
    """Enqueue the next budget of the bisection, where nothing else waits and bisection has trials left.

    One at a time: the next budget depends on how the last one fared, and on the first trials. Meanwhile other workers
    get what the sampler asks.
    """
    budgets = {trial.number: space.is_at(trial.user_attrs.get(PARAMS, {})) for trial in trials}
    for trial in trials:
        is_under_way = trial.state == TrialState.RUNNING and budgets[trial.number] is not None
        if trial.state == TrialState.WAITING or is_under_way:
            return
    # One that was cut off is tried again, as a trial of its own.
    if sum(_BISECTION in trial.user_attrs and OUTCOME in trial.user_attrs for trial in trials) >= NUM_TRIALS:
        return
    tried = []
    for trial in trials:
        outcome = trial.user_attrs.get(OUTCOME, {})
        budget, psnr = budgets[trial.number], outcome.get("psnr")
        # One that was given up because another is sparser says nothing about the gate.
        if budget is not None and psnr is not None and (trial.state == TrialState.COMPLETE or psnr < gate.min_psnr):
            tried.append(Tried(budget, bool(outcome["feasible"])))
    budget = next_budget(tried, *BUDGETS)
    if budget is not None:
        study.put(space.at(budget).params, **{THRESHOLDS: CALIBRATED, _BISECTION: True})
