"""What a study tries before its sampler is asked: the first trials, the way to the gate, and what lies just beyond."""

from collections.abc import Iterator, Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsetune.metrics import Gate
from sparsetune.tuning.approach import NUM_TRIALS, Tried, next_budget
from sparsetune.tuning.goal import largest_shortfall
from sparsetune.tuning.objective import best_sparsity
from sparsetune.tuning.shared import OUTCOME, PARAMS, SharedStudy
from sparsetune.tuning.space import AIM, BUDGETS, CALIBRATED, REACHES, THRESHOLDS, SearchSpace

_START = "start"
_LEAD, _BEYOND = "lead", "beyond"


def plan(study: SharedStudy, trials: list[FrozenTrial], space: SearchSpace, gate: Gate, aimed: bool) -> None:
    """Put in the queue what should be tried next, unless something waits there; called in the study's turn.

    Args:
        study: the study.
        trials: all that it has.
        space: what is searched.
        gate: what trials must meet.
        aimed: whether trials go for a reach beyond the best, see `Objective`.
    """
    has_starts = not trials or any(_START in trial.user_attrs for trial in trials)
    if has_starts and _enqueue_starts(study, space, trials):
        return
    if not isinstance(study.sampler, optuna.samplers.RandomSampler):  # who asks for random trials gets them
        _enqueue_lead(study, space, gate, trials, aimed)


def _enqueue_starts(study: SharedStudy, space: SearchSpace, trials: list[FrozenTrial]) -> bool:
    """Enqueue the first trials, as far as a process that died on it hasn't; gives whether there were any."""
    known = {trial.user_attrs.get(_START) for trial in trials}
    missing = [(index, start) for index, start in enumerate(space.warm_start()) if index not in known]
    for index, start in missing:
        study.put(start.params, **{THRESHOLDS: start.thresholds, _START: index})
    return bool(missing)


def _enqueue_lead(study: SharedStudy, space: SearchSpace, gate: Gate, trials: list[FrozenTrial], aimed: bool) -> None:
    """Enqueue the next budget on the way to the gate, then what lies just beyond the best.

    One at a time: the next budget depends on how the last one fared, and on the first trials. Meanwhile other workers
    get what the sampler asks.
    """
    budgets = {trial.number: space.is_at(trial.user_attrs.get(PARAMS, {})) for trial in trials}
    for trial in trials:
        is_under_way = trial.state == TrialState.RUNNING and budgets[trial.number] is not None
        if trial.state == TrialState.WAITING or is_under_way:
            return
    # One that was cut off is tried again, as a trial of its own.
    ended = [trial for trial in trials if OUTCOME in trial.user_attrs]
    if sum(_LEAD in trial.user_attrs for trial in ended) < NUM_TRIALS:
        budget = next_budget([*_tried(ended, budgets, gate)], *BUDGETS)
        if budget is not None:
            study.put(space.at(budget).params, **{THRESHOLDS: CALIBRATED, _LEAD: True})
            return
    best = best_sparsity(study) if aimed and space.kind == "budget" else 0.0
    running = [trial for trial in trials if trial.state == TrialState.RUNNING and OUTCOME not in trial.user_attrs]
    begun = sum(_BEYOND in trial.user_attrs for trial in (*ended, *running))
    if best and begun < len(REACHES):
        study.put(space.beyond(REACHES[begun]).params, **{THRESHOLDS: CALIBRATED, AIM: best, _BEYOND: True})


def _tried(trials: Sequence[FrozenTrial], budgets: Mapping[int, float | None], gate: Gate) -> Iterator[Tried]:
    """Give the budgets that were tried for all layers, with what their videos came to."""
    for trial in trials:
        outcome = trial.user_attrs[OUTCOME]
        budget, psnr = budgets[trial.number], outcome["psnr"]
        # One that was given up because another is sparser says nothing about the gate.
        if budget is not None and psnr is not None and (outcome["state"] == "complete" or psnr < gate.min_psnr):
            yield Tried(budget, -largest_shortfall(outcome["shortfalls"]))
