"""The straight way to the gate along one budget for all layers, before the sampler looks around."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsetune.metrics import Gate
from sparsetune.tuning.search.ranking import largest_shortfall
from sparsetune.tuning.search.space import AIM, BUDGETS, CALIBRATED, REACHES, THRESHOLDS, SearchSpace
from sparsetune.tuning.search.study import OUTCOME, best_sparsity

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


_START, _LEAD, _BEYOND = "start", "lead", "beyond"
"""User attributes of enqueued trials: one of the first ones, by its place; a budget on the way to the gate; a sparsity
beyond the best."""


def enqueue_next(
    study: optuna.Study, trials: list[FrozenTrial], space: SearchSpace, gate: Gate, *, adaptive: bool, aimed: bool
) -> None:
    """Enqueue what should be tried next, unless something waits; called under the study's lock.

    Args:
        study: the study.
        trials: all that it has.
        space: what is searched.
        gate: what trials must meet.
        adaptive: whether anything but the first trials is enqueued.
        aimed: whether trials aim at a sparsity beyond the best, see `Objective`.
    """
    has_starts = not trials or any(_START in trial.user_attrs for trial in trials)
    if has_starts and _enqueue_starts(study, space, trials):
        return
    if adaptive:
        _enqueue_lead(study, space, gate, trials, aimed)


def _enqueue_starts(study: optuna.Study, space: SearchSpace, trials: list[FrozenTrial]) -> bool:
    """Enqueue the first trials, as far as a process that died on it hasn't; returns whether there were any."""
    known = {trial.user_attrs.get(_START) for trial in trials}
    missing = [(index, start) for index, start in enumerate(space.warm_start()) if index not in known]
    for index, start in missing:
        study.enqueue_trial(start.params, user_attrs={THRESHOLDS: start.thresholds, _START: index})
    return bool(missing)


def _enqueue_lead(study: optuna.Study, space: SearchSpace, gate: Gate, trials: list[FrozenTrial], aimed: bool) -> None:
    """Enqueue the next budget on the way to the gate, then what lies just beyond the best.

    One at a time: the next budget depends on how the last one fared, and on the first trials. Meanwhile other workers
    get what the sampler proposes.
    """
    for trial in trials:
        attrs = trial.user_attrs
        is_budget = attrs.get(THRESHOLDS) == CALIBRATED and (_START in attrs or _LEAD in attrs)
        if trial.state == TrialState.WAITING or (trial.state == TrialState.RUNNING and is_budget):
            return
    # One that was cut off is tried again, as a trial of its own.
    ended = [trial for trial in trials if OUTCOME in trial.user_attrs]
    if sum(_LEAD in trial.user_attrs for trial in ended) < NUM_TRIALS:
        budget = next_budget([*_tried(ended, space, gate)], *BUDGETS)
        if budget is not None:
            study.enqueue_trial(space.at(budget).params, user_attrs={THRESHOLDS: CALIBRATED, _LEAD: True})
            return
    best = best_sparsity(trials) if aimed and space.kind == "budget" else 0.0
    running = [trial for trial in trials if trial.state == TrialState.RUNNING and OUTCOME not in trial.user_attrs]
    begun = sum(_BEYOND in trial.user_attrs for trial in (*ended, *running))
    if best and begun < len(REACHES):
        attrs = {THRESHOLDS: CALIBRATED, AIM: best, _BEYOND: True}
        study.enqueue_trial(space.beyond(REACHES[begun]).params, user_attrs=attrs)


def _tried(trials: Sequence[FrozenTrial], space: SearchSpace, gate: Gate) -> Iterator[Tried]:
    """Yield the budgets that were tried for all layers, with what their videos came to."""
    for trial in trials:
        outcome = trial.user_attrs[OUTCOME]
        budget, psnr = space.is_at(outcome["params"]), outcome["psnr"]
        # One that was pruned because another is sparser says nothing about the gate.
        if budget is not None and psnr is not None and (outcome["state"] == "complete" or psnr < gate.min_psnr):
            yield Tried(budget, -largest_shortfall(outcome["shortfalls"]))
