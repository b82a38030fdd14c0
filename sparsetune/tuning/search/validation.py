"""The best trials on validation prompts, so that the winner's videos meet the gate on more than what chose it."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsetune.errors import GenerationError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Event, Incident, StepDone, run_all
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import TrialResult, Validation, notify
from sparsetune.tuning.search.ranking import largest_shortfall, mean, shortfalls, winner

logger = logging.getLogger(__name__)

MAX_VALIDATIONS = 4
"""Most trials that are rendered on the validation prompts."""


def validated_winner(
    context: TuningContext, trials: Sequence[TrialResult]
) -> tuple[TrialResult | None, tuple[Validation, ...], bool]:
    """Return the best trial that meets the search's gate on the validation prompts too, and what was rendered of which.

    Prompts differ in difficulty for all policies alike, by several dB in the mean of four. So where a trial misses the
    gate on the validation prompts, the next one is the best that would meet it if it lost as much as the worst of those
    tried. Where there is none, the one that would miss it by the least is tried. Where none meets it, after
    `MAX_VALIDATIONS` or when time is up, the one that misses it by the least wins; the eval prompts judge it.

    Returns:
        The winner, None where no trial could win; the validations, in order; whether Ctrl-C ended them.
    """
    best = candidate = winner(context.goal, trials)
    done, lost = list[Validation](), dict[str, float]()
    while candidate is not None and context.validation_prompts and len(done) < MAX_VALIDATIONS:
        if done and not context.has_time():
            break
        try:
            done.append(_validate(context, candidate))
        except KeyboardInterrupt:
            context.executor.cancel_all()
            return _closest(trials, done) or best, tuple(done), True
        notify(context.listeners, lambda listener: listener.on_validation(done[-1]))
        if done[-1].feasible:
            return candidate, tuple(done), False
        lost = _more_lost(lost, candidate, done[-1])
        candidate = _next(context, trials, {one.number for one in done}, lost)
    if (closest := _closest(trials, done)) is not None:
        best = closest
        logger.warning(
            "trials that meet the gate on the tune prompts miss it on the %d validation prompts; the winner, trial %d, "
            "misses it there by the least", len(context.validation_prompts), best.number
        )  # fmt: skip
    return best, tuple(done), False


def _closest(trials: Sequence[TrialResult], done: Sequence[Validation]) -> TrialResult | None:
    """Return the trial that misses the gate on the validation prompts by the least; None where none was rendered."""
    if not done:
        return None
    closest = min(done, key=lambda one: largest_shortfall(one.shortfalls) if one.shortfalls else math.inf)
    return next(trial for trial in trials if trial.number == closest.number)


def _next(
    context: TuningContext, trials: Sequence[TrialResult], tried: set[int], lost: Mapping[str, float]
) -> TrialResult | None:
    """Return the trial to validate after those that lost as much, by bound of the gate; None where all that help were.

    It loses that much too, so what it exceeds the gate by on the tune prompts has to make up for it.
    """

    def missing(trial: TrialResult) -> float:
        return largest_shortfall({name: value + lost.get(name, 0.0) for name, value in trial.shortfalls.items()})

    could_win = [trial for trial in trials if winner(context.goal, [trial]) is not None]
    safe = [trial for trial in could_win if missing(trial) <= 0.0 and trial.number not in tried]
    if safe:
        return winner(context.goal, safe)
    safest = min(could_win, key=missing)
    return None if safest.number in tried else safest


def _more_lost(lost: Mapping[str, float], trial: TrialResult, validation: Validation) -> dict[str, float]:
    """Add by how much more a trial misses each bound than on the tune prompts; nothing where a rendering failed."""
    more = {name: value - trial.shortfalls.get(name, value) for name, value in validation.shortfalls.items()}
    return {name: max(value, lost.get(name, value)) for name, value in more.items()} or dict(lost)


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
