"""The best trials on validation prompts, so that the winner's videos meet the gate on more than what chose it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from sparsetune.errors import GenerationError
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.executor import Event, Incident, StepDone, run_all
from sparsetune.tuning.context import TuningContext
from sparsetune.tuning.events import TrialResult, Validation, notify
from sparsetune.tuning.search.ranking import excess_db, largest_shortfall, mean, shortfalls, winner

logger = logging.getLogger(__name__)


def validated_winner(
    context: TuningContext, trials: Sequence[TrialResult]
) -> tuple[TrialResult | None, tuple[Validation, ...]]:
    """Return the best trial that meets the search's gate on the validation prompts too, and what was rendered of which.

    Prompts differ in difficulty for all policies alike, by several dB in the mean of four. So where a trial misses the
    gate on the validation prompts, the next one is the best that exceeds it on the tune prompts by what this one lost.
    Where none is left, the one that misses it by the least wins; the eval prompts judge it.
    """
    candidate, done = winner(context.goal, trials), list[Validation]()
    best = candidate
    while candidate is not None and context.validation_prompts:
        done.append(_validate(context, candidate))
        notify(context.listeners, lambda listener: listener.on_validation(done[-1]))
        if done[-1].feasible:
            return candidate, tuple(done)
        needed = excess_db(candidate) - done[-1].excess_db
        candidate = _next(context, trials, {one.number for one in done}, needed)
    if done:
        closest = max(done, key=lambda one: one.excess_db)
        best = next(trial for trial in trials if trial.number == closest.number)
        logger.warning(
            "no trial that meets the gate on the tune prompts meets it on the %d validation prompts; the winner, trial "
            "%d, misses it there by %.1f dB", closest.num_prompts, closest.number, -closest.excess_db
        )  # fmt: skip
    return best, tuple(done)


def _next(context: TuningContext, trials: Sequence[TrialResult], known: set[int], needed: float) -> TrialResult | None:
    """Return the best of the others that exceed the gate by `needed` dB, else once the one that exceeds it most."""
    could_win = [trial for trial in trials if winner(context.goal, [trial]) is not None]
    enough = [trial for trial in could_win if excess_db(trial) >= needed and trial.number not in known]
    if enough:
        return winner(context.goal, enough)
    safest = max(could_win, key=excess_db)
    return None if safest.number in known else safest


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
        return Validation(trial.number, len(prompts), None, None, -math.inf)
    psnrs = [result.metrics["psnr"] for result in results]
    return Validation(
        trial.number, len(prompts), mean(results, "psnr"), min(psnrs), -largest_shortfall(shortfalls(results, gate))
    )
