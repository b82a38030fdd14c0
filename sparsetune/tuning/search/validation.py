"""The best trials on validation prompts, so that the winner's videos meet the gate on more than what chose it."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sparsetune.errors import GenerationError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Event, Incident, StepDone, run_all
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import Parameter, TrialResult, Validation, notify
from sparsetune.tuning.search.ranking import largest_shortfall, mean, shortfalls, winner
from sparsetune.tuning.search.space import BUDGETS, CALIBRATED, REFERENCE, THRESHOLDS
from sparsetune.tuning.search.warm_start import Tried, next_budget

logger = logging.getLogger(__name__)


NUM_REPAIRS = 2
"""Most trials with lower budgets that are run after one that misses the gate on the validation prompts."""

_SLACK_DB = 0.3
"""By how much such a trial is to exceed the gate if it loses as much as the one that missed."""

Repair = Callable[[Mapping[str, Parameter]], tuple[TrialResult, ...]]
"""Runs one more trial with these parameters; returns all trials."""


def validated_winner(
    context: TuningContext, trials: tuple[TrialResult, ...], repair: Repair | None = None
) -> tuple[TrialResult | None, tuple[Validation, ...]]:
    """Return the best trial that meets the search's gate on the validation prompts too, and what was rendered of which.

    Prompts differ in difficulty for all policies alike, by several dB in the mean of four. So where a trial misses the
    gate on the validation prompts, the next one is the best that would meet it if it lost as much as this one; `repair`
    runs trials with a lower budget for that. Where there is none, the one that would miss it by the least is tried, and
    of those tried the one that does so wins; the eval prompts judge it.
    """
    best = candidate = winner(context.goal, trials)
    done, lost, repairs_left = list[Validation](), dict[str, float](), NUM_REPAIRS
    while candidate is not None and context.validation_prompts:
        done.append(_validate(context, candidate))
        notify(context.listeners, lambda listener: listener.on_validation(done[-1]))
        if done[-1].feasible:
            return candidate, tuple(done)
        lost = _more_lost(lost, candidate, done[-1])
        if repair and repairs_left and (params := repaired(candidate, trials, lost)) is not None:
            trials, repairs_left = repair(params), repairs_left - 1
        candidate = _next(context, trials, {one.number for one in done}, lost)
    if done:
        closest = min(done, key=_missing_db)
        best = next(trial for trial in trials if trial.number == closest.number)
        logger.warning(
            "no trial that meets the gate on the tune prompts meets it on the %d validation prompts; the winner, trial "
            "%d, misses it there by %.1f dB", closest.num_prompts, closest.number, _missing_db(closest)
        )  # fmt: skip
    return best, tuple(done)


def repaired(
    trial: TrialResult, trials: Sequence[TrialResult], lost: Mapping[str, float]
) -> dict[str, Parameter] | None:
    """Return a trial's parameters with the budget at which it would meet the gate if it lost as much, by bound.

    None where that budget is known from trials that differ in their budget alone, or the trial has none.
    """
    if _budget(trial) is None:
        return None
    alike = [
        one for one in trials if one.state == "complete" and _budget(one) is not None and _rest(one) == _rest(trial)
    ]
    tried = [Tried(_budget(one) or 0.0, -_missing(one, lost) - _SLACK_DB) for one in alike]
    budget = next_budget(tried, *BUDGETS)
    return None if budget is None else _rest(trial) | {"l1": budget}


def _budget(trial: TrialResult) -> float | None:
    """The error that a trial's thresholds may cause: its budget, or what calibration says of its target's policy."""
    if trial.params.get(THRESHOLDS) != CALIBRATED:
        return None
    budget = trial.params.get("l1", trial.predicted_error)
    return None if budget is None else float(budget)


def _rest(trial: TrialResult) -> dict[str, Parameter]:
    left_out = ("l1", "reach", REFERENCE, THRESHOLDS)
    return {name: value for name, value in trial.params.items() if name not in left_out}


def _missing(trial: TrialResult, lost: Mapping[str, float]) -> float:
    return largest_shortfall({name: value + lost.get(name, 0.0) for name, value in trial.shortfalls.items()})


def _next(
    context: TuningContext, trials: Sequence[TrialResult], tried: set[int], lost: Mapping[str, float]
) -> TrialResult | None:
    """Return the trial to validate after one that lost as much, by bound of the gate; None where all that help were."""
    could_win = [trial for trial in trials if winner(context.goal, [trial]) is not None]
    safe = [trial for trial in could_win if _missing(trial, lost) <= 0.0 and trial.number not in tried]
    if safe:
        return winner(context.goal, safe)
    safest = min(could_win, key=lambda trial: _missing(trial, lost))
    return None if safest.number in tried else safest


def _more_lost(lost: Mapping[str, float], trial: TrialResult, validation: Validation) -> dict[str, float]:
    """Add by how much more a trial misses each bound than on the tune prompts; nothing where a rendering failed."""
    more = {name: value - trial.shortfalls.get(name, value) for name, value in validation.shortfalls.items()}
    return {name: max(value, lost.get(name, value)) for name, value in more.items()} or dict(lost)


def _missing_db(validation: Validation) -> float:
    return largest_shortfall(validation.shortfalls) if validation.shortfalls else math.inf


def _validate(context: TuningContext, trial: TrialResult) -> Validation:
    prompts, gate = context.validation_prompts, context.search_gate

    def on_event(index: int, event: Event) -> None:
        if isinstance(what := event.what, Incident):
            notify(context.listeners, lambda listener: listener.on_incident(what))
        elif isinstance(what, StepDone):
            step = replace(
                what,
                phase="validation",
                index=2 * index + (what.side == "sparse"),
                num_renderings=2 * len(prompts),
                worker=event.worker,
            )
            notify(context.listeners, lambda listener: listener.on_step(step))

    tasks = [context.score(prompt, trial.policy, gate.metrics) for prompt in prompts]
    results = list[PromptResult]()
    try:
        results += [ended.result() for _, ended in run_all(context.executor, tasks, on_event)]
    except GenerationError:  # out of memory, or NaN
        context.executor.cancel_all()
        return Validation(trial.number, len(prompts), None, None, False)
    missing, worst = shortfalls(results, gate), min(result.metrics["psnr"] for result in results)
    return Validation(
        trial.number, len(prompts), mean(results, "psnr"), worst, all(each <= 0.0 for each in missing.values()), missing
    )
