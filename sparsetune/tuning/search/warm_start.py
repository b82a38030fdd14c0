"""First trials: caches alone, the budget at which PSNR just meets the gate, targets beyond the best."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsetune.metrics import Gate
from sparsetune.tuning.events import Parameter
from sparsetune.tuning.search.caches import has_slack
from sparsetune.tuning.search.ranking import largest_shortfall
from sparsetune.tuning.search.space import (
    BUDGETS,
    CALIBRATED,
    DENSE,
    FIRST_TARGETS,
    INITIAL_BUDGETS,
    REFERENCE,
    THRESHOLDS,
    SearchSpace,
)
from sparsetune.tuning.search.study import OUTCOME, best_sparsity

NUM_TRIALS = 6
"""Most trials of the search for that budget, beyond the first one."""

CLOSE = 1.05
"""Budgets within about this factor count as the same: their videos differ by no more than the prompts' noise."""

STEPS_UP = (1.25, 4.0)
"""Least and largest factor to step by while only budgets that pass are known."""

STEPS_DOWN = (2.0, 4.0)
"""Least and largest factor to step down by while none has passed: a short search is to end with one that does."""

DB_PER_DOUBLING = 6.0
"""By how much PSNR falls with twice the budget, until two budgets are known: its error is then about twice as large."""

JOINT_FACTOR = 0.5
"""The first budget with a cache, of the largest one that passes without."""

_NOISE_DB = 0.7
"""Standard error of a trial's mean PSNR on the demo model; trials nearer to the gate than this have equal weights."""


@dataclass(frozen=True)
class Tried:
    """A budget for all layers, and by how many dB its videos exceed the gate (negative: miss it)."""

    budget: float
    excess_db: float


def next_budget(tried: Sequence[Tried], lowest: float, highest: float) -> float | None:
    """Return the budget to try next, None if nothing was tried or the budget that just meets the gate is known.

    PSNR falls about linearly with the logarithm of the budget, plus noise of the prompts. So a straight line is fitted:
    a trial that fails by chance would mislead a bisection.
    """
    if not tried:
        return None
    known, passed = [each.budget for each in tried], [each.budget for each in tried if each.excess_db >= 0]
    if not passed:
        least, largest = STEPS_DOWN
        wanted = max(lowest, _crossing(tried, min(known) / largest, min(known) / least))
        return None if wanted in known else wanted
    if max(passed) == max(known):
        least, largest = STEPS_UP
        wanted = min(highest, _crossing(tried, max(known) * least, max(known) * largest))
        return None if wanted in known else wanted
    below = max((each for each in tried if each.excess_db >= 0), key=lambda each: each.budget)
    above = min((each for each in tried if each.budget > below.budget), key=lambda each: each.budget)
    crossing = _crossing(tried, min(known), max(known))
    if not below.budget < crossing < above.budget * CLOSE:  # PSNR doesn't fall along one line over that range
        crossing = _crossing((below, above), below.budget, above.budget)
    for wanted in (crossing, crossing / CLOSE, crossing / CLOSE**2):  # lower where the previous one failed
        if max(passed) * math.sqrt(CLOSE) > wanted:
            return None
        if all(abs(math.log(wanted / budget)) > math.log(CLOSE) / 2 for budget in known):
            return wanted
    return None


def _crossing(tried: Sequence[Tried], lowest: float, highest: float) -> float:
    """Budget from `lowest` to `highest` at which a line fitted through the trials meets the gate.

    Trials near the gate weigh most. Where only noise is seen, it is the range's geometric mean.
    """
    budget, excess = np.log([each.budget for each in tried]), np.array([each.excess_db for each in tried])
    if len(tried) == 1:
        slope = -DB_PER_DOUBLING / math.log(2.0)
        offset = excess[0] - slope * budget[0]
    else:
        slope, offset = np.polyfit(budget, excess, 1, w=1.0 / (_NOISE_DB + np.abs(excess)))
    if slope >= 0:
        return math.sqrt(lowest * highest)
    return math.exp(np.clip(-offset / slope, math.log(lowest), math.log(highest)))


_START, _BUDGET, _TARGET, _RUNG, _JOINT = "start", "lead", "beyond", "rung", "joint"
"""User attributes of enqueued trials: index among the first ones; budget near the gate; target beyond the best; rung of
a cache's ladder; a budget with a cache."""

_SLACK_DB = 2.0
"""A cache to which sparsity is added should exceed the gate by as much, if one does."""


def enqueue_next(
    study: optuna.Study, trials: list[FrozenTrial], space: SearchSpace, gate: Gate, *, adaptive: bool, aimed: bool
) -> None:
    """Enqueue the next trial, unless one waits; called under the study's lock. See `Objective` for the flags.

    Once the outcome of one budget is known, those that are left of the first ones would tell less than the next budget;
    they are for workers that would have to wait for that.
    """
    has_starts = not trials or any(_START in trial.user_attrs for trial in trials)
    ended = [trial for trial in trials if OUTCOME in trial.user_attrs]
    is_known = adaptive and aimed and any(_tried(ended, space, gate)) and not any(map(_is_running_budget, trials))
    if has_starts and not is_known and _enqueue_starts(study, space, trials):
        return
    if adaptive and not _enqueue_rung(study, space, trials) and space.curves is not None:
        _enqueue_near(study, space, gate, trials, aimed)


def _enqueue_starts(study: optuna.Study, space: SearchSpace, trials: list[FrozenTrial]) -> bool:
    """Enqueue the next of the first trials, unless an interrupted one waits; returns whether any was missing."""
    known = {trial.user_attrs.get(_START) for trial in trials}
    missing = [(index, start) for index, start in enumerate(space.warm_start()) if index not in known]
    if missing and not any(trial.state == TrialState.WAITING for trial in trials):
        index, start = missing[0]
        study.enqueue_trial(start.params, user_attrs={THRESHOLDS: start.thresholds, _START: index})
    return bool(missing)


def _enqueue_rung(study: optuna.Study, space: SearchSpace, trials: list[FrozenTrial]) -> bool:
    """Enqueue the next cache without sparsity, unless one waits or runs; returns whether any is still to be tried."""
    if space.caches is None:
        return False
    rungs = [trial for trial in trials if _RUNG in trial.user_attrs]
    ended = [trial for trial in rungs if OUTCOME in trial.user_attrs]
    # An interrupted trial is retried as a new trial.
    if any(trial.state in (TrialState.WAITING, TrialState.RUNNING) for trial in rungs if trial not in ended):
        return True
    known = [
        (trial.user_attrs[OUTCOME]["params"]["cache"], trial.user_attrs[_RUNG], trial.user_attrs[OUTCOME]["feasible"])
        for trial in ended
    ]
    wanted = space.caches.next_rung(known)
    if wanted is None:
        return False
    study.enqueue_trial(space.caches.rung(*wanted), user_attrs={THRESHOLDS: DENSE, _RUNG: wanted[1]})
    return True


def _enqueue_near(study: optuna.Study, space: SearchSpace, gate: Gate, trials: list[FrozenTrial], aimed: bool) -> None:
    """Enqueue the next budget near the gate, then targets just beyond the best.

    One at a time: the next budget depends on the outcomes of the last one and of the first trials. Meanwhile the
    sampler proposes the other workers' trials.
    """
    if any(trial.state == TrialState.WAITING or _is_running_budget(trial) for trial in trials):
        return
    # An interrupted trial is retried as a new trial.
    ended = [trial for trial in trials if OUTCOME in trial.user_attrs]
    if sum(_BUDGET in trial.user_attrs for trial in ended) < NUM_TRIALS:
        budget = next_budget([*_tried(ended, space, gate)], *BUDGETS)
        # One that was pruned because another is sparser isn't tried again.
        known = [
            known for trial in ended if (known := space.budget_of(trial.user_attrs[OUTCOME]["params"])) is not None
        ]
        if budget is not None and budget not in known:
            study.enqueue_trial(space.with_budget(budget).params, user_attrs={THRESHOLDS: CALIBRATED, _BUDGET: True})
            return
    if space.caches is not None and space.kind == "budget":
        _enqueue_joint(study, space, gate, ended)
        return
    best = best_sparsity(trials) if aimed and space.kind == "budget" else 0.0
    running = [trial for trial in trials if trial.state == TrialState.RUNNING and OUTCOME not in trial.user_attrs]
    num_targets = sum(_TARGET in trial.user_attrs for trial in (*ended, *running))
    if best and num_targets < len(FIRST_TARGETS):
        attrs = {THRESHOLDS: CALIBRATED, REFERENCE: best, _TARGET: True}
        study.enqueue_trial(space.with_target(FIRST_TARGETS[num_targets]).params, user_attrs=attrs)


def _is_running_budget(trial: FrozenTrial) -> bool:
    attrs = trial.user_attrs
    is_budget = attrs.get(THRESHOLDS) == CALIBRATED and any(name in attrs for name in (_START, _BUDGET, _JOINT))
    return trial.state == TrialState.RUNNING and is_budget


def _enqueue_joint(study: optuna.Study, space: SearchSpace, gate: Gate, ended: Sequence[FrozenTrial]) -> None:
    """Enqueue the next budget with the cache that saves most and leaves some of the error to sparsity."""
    joint = [trial for trial in ended if _JOINT in trial.user_attrs]
    if len(joint) >= NUM_TRIALS:
        return
    outcomes = [trial.user_attrs[OUTCOME] for trial in ended if _RUNG in trial.user_attrs]
    alone = [outcome for outcome in outcomes if outcome["feasible"]]
    chosen = has_slack(
        [-largest_shortfall(outcome["shortfalls"]) for outcome in alone],
        [outcome["seconds_sparse"] / (outcome["seconds_dense"] or 1.0) for outcome in alone],
        _SLACK_DB,
    )
    if chosen is None:
        return
    params = {name: value for name, value in alone[chosen]["params"].items() if name != THRESHOLDS}
    tried = [*_tried(joint, space, gate, params)]
    passed = [each.budget for each in _tried(ended, space, gate) if each.excess_db >= 0]
    first = max(BUDGETS[0], max(passed, default=min(INITIAL_BUDGETS)) * JOINT_FACTOR)
    budget = next_budget(tried, *BUDGETS) if tried else first
    if budget is not None:
        attrs = {THRESHOLDS: CALIBRATED, _JOINT: True}
        study.enqueue_trial(space.with_budget(budget, params).params, user_attrs=attrs)


def _tried(
    trials: Sequence[FrozenTrial], space: SearchSpace, gate: Gate, cache: Mapping[str, Parameter] | None = None
) -> Iterator[Tried]:
    for trial in trials:
        outcome = trial.user_attrs[OUTCOME]
        budget, psnr = space.budget_of(outcome["params"], cache), outcome["psnr"]
        # A trial that was pruned because another is sparser isn't informative about the gate.
        if budget is not None and psnr is not None and (outcome["state"] == "complete" or psnr < gate.min_psnr):
            yield Tried(budget, -largest_shortfall(outcome["shortfalls"]))
