"""The search with Optuna: `Study.optimize` in a thread for each worker, until trials or time are used up."""

import functools
import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from optuna.trial import FrozenTrial

from sparsetune.bench.step_time import StepSeconds
from sparsetune.errors import GenerationError, TuningError
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.context import TimeIsUp, TuningContext, digest, signature
from sparsetune.tuning.events import TrialResult, TuningResult, Validation
from sparsetune.tuning.search.caches import CacheSpace
from sparsetune.tuning.search.objective import Objective, SearchStopped, TrialRunner
from sparsetune.tuning.search.ranking import closest, search_statistics, winner
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.search.study import OUTCOME, NoTrialLeft, SharedStudy, count, open_study
from sparsetune.tuning.search.validation import validated_winner
from sparsetune.tuning.search.warm_start import enqueue_next
from sparsetune.urls import sqlite_url

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Interval at which a process with idle workers checks whether another process's trial has to be run again."""

_MAX_THREADS = 4096  # the pool starts one only for a worker


def open_search(context: TuningContext) -> SharedStudy:
    """Create or resume the configuration's study and notify the listeners of its start.

    Raises:
        TuningError: the study can't be opened or has other settings.
    """
    config, tune = context.config, context.config.tune
    shared = signature(context)
    name = tune.study_name or f"{config.model.name}-{digest(shared)[:8]}"  # the same command resumes it
    storage = tune.storage or sqlite_url(config.tracking.root / "optuna.db")
    config.tracking.root.mkdir(parents=True, exist_ok=True)
    study = open_study(storage, name, shared, tune.seed, tune.n_trials, tune.sampler, context.goal)
    context.start(name, storage, tune.n_trials, study)
    return study


def search(
    context: TuningContext,
    study: SharedStudy,
    curves: Curves | None,
    sensitivity: Sensitivity,
    step: StepSeconds | None = None,
    caches: CacheSpace | None = None,
) -> TuningResult:
    """Run a study's trials; the result has all trials and the winner, but not yet its evaluation.

    curves: None searches caches alone.
    step: what a denoising step costs on this GPU; None where the kernel computes every pair.
    caches: the step caches to search, if any.
    """
    tune = context.config.tune
    space = SearchSpace(
        curves,
        sensitivity,
        tune.space,
        tune.granularity,
        tune.orders,
        tune.rules,
        context.keep_text,
        tune.skip_pv,
        tune.schedule,
        step,
        caches,
        context.runtime.layers,
    )
    objective, interrupted = _run_trials(context, study, space)
    elsewhere = study.num_running_elsewhere()  # before the trials are read: one that ends in between is among them
    trials = results(study, objective)
    best, validations = winner(context.goal, trials), tuple[Validation, ...]()
    if not interrupted and not elsewhere:
        best, validations, interrupted = validated_winner(context, trials)
    still = "1 trial still runs" if elsewhere == 1 else f"{elsewhere} trials still run"
    return TuningResult(
        study.study_name,
        trials,
        best,
        None if best else closest(trials),
        interrupted=interrupted,
        insight=search_statistics(study, context.goal, trials),
        validations=validations,
        left_to=f"{still} in other processes of the study, the last of which judges the winner" if elsewhere else None,
    )


def _run_trials(context: TuningContext, study: SharedStudy, space: SearchSpace) -> tuple[Objective, bool]:
    tune, runner = context.config.tune, TrialRunner.of(context, space.predict)
    objective = Objective(
        runner,
        space,
        context.goal,
        penalised=tune.sampler == "cmaes",
        # A Pareto front covers all sparsities, and random sampling must stay random.
        aimed=context.goal != "pareto" and tune.sampler != "random",
        adaptive=tune.sampler != "random",
        trial_videos=context.trial_videos,
    )
    try:
        optimize(study, objective, context.seconds_left)
    except KeyboardInterrupt:
        if not _has_feasible(study):
            raise
        return objective, True
    except TuningError as error:
        if not _has_feasible(study):
            raise
        logger.warning("the search stops with the best so far: %s", error)
    if space.curves is not None:
        _check_ran_sparse(objective)
    return objective, False


def optimize(study: SharedStudy, objective: Objective, seconds: float | None = None) -> None:
    """Run trials, as many at a time as there are workers, until the study has `study.n_trials` or `seconds` are over.

    Other processes may do the same: one that has no trial left waits for those of the others, to run them again if a
    process dies. When time is up, trials end after the prompts that are being rendered, and are enqueued again. A
    trial that runs out of memory or has NaN counts as failed.

    Raises:
        TuningError: three trials in a row failed for the same reason.
        ExecutorError: no worker is left.
        KeyboardInterrupt: Ctrl-C; interrupted trials are enqueued again.
    """
    runner = objective.runner
    runner.deadline = None if seconds is None else time.perf_counter() + seconds
    study.suggest = objective.suggest
    study.enqueue_next = functools.partial(
        enqueue_next,
        study,
        space=objective.space,
        gate=runner.gate,
        adaptive=objective.adaptive,
        aimed=objective.aimed,
    )
    with study.running(), ThreadPoolExecutor(_MAX_THREADS, "trials") as pool:
        try:
            _optimize(study, objective, pool)
        except BaseException as error:
            objective.stop(error)
            raise
    if objective.error is not None:
        raise objective.error


def _optimize(study: SharedStudy, objective: Objective, pool: ThreadPoolExecutor) -> None:
    """Keep a thread for each worker, also for those that join later; a single worker's trials run in this thread."""
    runner, threads, waited_for = objective.runner, set[Future[None]](), 0
    while True:
        is_over = runner.is_over or objective.error is not None
        num_running = 0
        if not is_over and (num_free := runner.executor.num_workers - len(threads)) > 0:
            num_done, num_running = count(study.requeue())
            is_over, num_left = num_done >= study.n_trials, study.n_trials - num_done - num_running
            if num_left > 0 and runner.executor.num_workers == 1 and not threads:
                _run_worker(study, objective, n_trials=1)  # in this thread, where Ctrl-C ends a rendering
                continue
            threads |= {pool.submit(_run_worker, study, objective) for _ in range(min(num_free, num_left))}
        if threads:
            ended, threads = wait(threads, POLL_SECONDS, FIRST_COMPLETED)
            for thread in ended:
                thread.result()
        elif is_over:
            return
        else:
            if num_running != waited_for:
                waited_for = num_running
                what = "1 trial" if num_running == 1 else f"{num_running} trials"
                runner.notify(lambda listener, what=what: listener.on_wait(what))  # type: ignore[misc]
            time.sleep(POLL_SECONDS)


def _run_worker(study: SharedStudy, objective: Objective, n_trials: int | None = None) -> None:
    """Run trials on one worker until none is left or the time is up."""
    deadline = objective.runner.deadline
    try:
        study.optimize(
            objective,
            n_trials,
            timeout=None if deadline is None else deadline - time.perf_counter(),
            callbacks=[objective.after_trial],
            catch=(GenerationError,),
        )
    except (NoTrialLeft, TimeIsUp, SearchStopped):
        pass
    except Exception:  # Optuna raises where another process failed the trial
        if objective.error is not None or not objective.has_lost:
            raise
        objective.has_lost = False


def results(study: SharedStudy, objective: Objective) -> tuple[TrialResult, ...]:
    """Return all trials with an outcome, in order; only this process's have the results of each prompt."""
    return tuple(
        objective.results.get(trial.number) or _from_storage(trial, objective.space)
        for trial in study.get_trials(deepcopy=False)
        if OUTCOME in trial.user_attrs
    )


def _from_storage(trial: FrozenTrial, space: SearchSpace) -> TrialResult:
    known = trial.user_attrs[OUTCOME]
    return TrialResult(number=trial.number, policy=space.policy(known["params"]), prompts=(), **known)


def _has_feasible(study: SharedStudy) -> bool:
    return any(trial.user_attrs.get(OUTCOME, {}).get("feasible") for trial in study.get_trials(deepcopy=False))


def _check_ran_sparse(objective: Objective) -> None:
    stats = [prompt.stats for trial in objective.results.values() for prompt in trial.prompts if prompt.stats]
    reasons = sorted({reason for each in stats for reason in each.fallbacks})
    if stats and reasons and not any(each.num_calls["sparse"] for each in stats):
        raise TuningError(
            f"all attention calls fell back to dense: {'; '.join(reasons)}; try another --backend or --dtype"
        )
