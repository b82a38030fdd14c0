"""The search with Optuna: `Study.optimize` with a thread for each worker, until trials or time are used up."""

import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from optuna.trial import FrozenTrial

from sparsetune.errors import GenerationError, TuningError
from sparsetune.tuning.calibration.curves import Curves
from sparsetune.tuning.calibration.sensitivity import Sensitivity
from sparsetune.tuning.context import TimeIsUp, TuningContext, digest, signature
from sparsetune.tuning.events import SearchStatistics, TrialResult, TuningResult
from sparsetune.tuning.search.objective import Objective, SearchStopped, TrialRunner
from sparsetune.tuning.search.ranking import closest, importances, rank_correlation, winner
from sparsetune.tuning.search.space import SearchSpace
from sparsetune.tuning.search.study import OUTCOME, NoTrialLeft, SharedStudy, count, open_study
from sparsetune.tuning.search.warm_start import enqueue_next

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Interval at which a process without trials checks whether another process's trial has to be run again."""


def open_search(context: TuningContext) -> SharedStudy:
    """Create or resume the configuration's study and notify the listeners of its start.

    Raises:
        TuningError: the study can't be opened or has other settings.
    """
    config, tune = context.config, context.config.tune
    shared = signature(context)
    name = tune.study_name or f"{config.model.name}-{digest(shared)[:8]}"  # the same command resumes it
    storage = tune.storage or f"sqlite:///{config.tracking.root / 'optuna.db'}"
    config.tracking.root.mkdir(parents=True, exist_ok=True)
    study = open_study(storage, name, shared, tune.seed, tune.n_trials, tune.sampler, tune.objective)
    context.start(name, storage, tune.n_trials, study)
    return study


def search(context: TuningContext, study: SharedStudy, curves: Curves, sensitivity: Sensitivity) -> TuningResult:
    """Run a study's trials; the result has all trials and the winner, but not yet its evaluation."""
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
    )
    objective, interrupted = _run_trials(context, study, space)
    trials = results(study, objective)
    best, elsewhere = winner(tune.objective, trials), study.num_running_elsewhere()
    still = "1 trial still runs" if elsewhere == 1 else f"{elsewhere} trials still run"
    return TuningResult(
        study.study_name,
        trials,
        best,
        None if best else closest(trials),
        interrupted=interrupted,
        insight=SearchStatistics(rank_correlation(trials), importances(study, tune.objective)),
        left_to=f"{still} in other processes of the study, the last of which judges the winner" if elsewhere else None,
    )


def _run_trials(context: TuningContext, study: SharedStudy, space: SearchSpace) -> tuple[Objective, bool]:
    tune, runner = context.config.tune, TrialRunner.of(context, space.predict)
    objective = Objective(
        runner,
        space,
        tune.objective,
        penalised=tune.sampler == "cmaes",
        # A Pareto front covers all sparsities, and random sampling must stay random.
        aimed=tune.objective != "pareto" and tune.sampler != "random",
        adaptive=tune.sampler != "random",
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
    _check_ran_sparse(objective)
    return objective, False


def optimize(study: SharedStudy, objective: Objective, seconds: float | None = None) -> None:
    """Run trials until the study has `study.n_trials`, or `seconds` are over.

    Other processes may do the same: one that has no trial left waits for those of the others, to run them again if a
    process dies. When time is up, trials end after the prompts that are being rendered, and are enqueued again. A
    trial that runs out of memory or has NaN counts as failed.

    Raises:
        TuningError: three trials in a row failed for the same reason.
        ExecutorError: no worker is left.
        KeyboardInterrupt: Ctrl-C; interrupted trials are enqueued again.
    """
    runner, waited_for = objective.runner, 0
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
    with study.running():
        while not runner.is_over:
            num_done, num_running = count(study.requeue())
            if num_done >= study.n_trials:
                return
            if num_done + num_running < study.n_trials:
                _optimize(study, objective)
                continue
            if num_running != waited_for:
                waited_for = num_running
                what = "1 trial" if num_running == 1 else f"{num_running} trials"
                runner.notify(lambda listener, what=what: listener.on_wait(what))  # type: ignore[misc]
            time.sleep(POLL_SECONDS)


def _optimize(study: SharedStudy, objective: Objective) -> None:
    """Run `study.optimize` until no trial is left, workers joined, or the time is up."""
    deadline, objective.num_jobs = objective.runner.deadline, objective.runner.executor.num_workers
    optimize = functools.partial(
        study.optimize,
        objective,
        n_jobs=objective.num_jobs,
        timeout=None if deadline is None else deadline - time.perf_counter(),
        callbacks=[objective.after_trial],
        catch=(GenerationError,),
    )
    objective.has_lost = False
    try:
        if objective.num_jobs == 1:  # in this thread, where Ctrl-C ends a rendering
            optimize()
        else:
            _optimize_in_thread(optimize, objective)
    except (NoTrialLeft, TimeIsUp, SearchStopped):
        pass
    except Exception:  # Optuna raises where another process failed the trial
        if objective.error is None and not objective.has_lost:
            raise
    if objective.error is not None:
        raise objective.error


def _optimize_in_thread(optimize: functools.partial[None], objective: Objective) -> None:
    """Optimize while this thread waits for Ctrl-C, which must cancel the trials that `optimize` waits for."""
    with ThreadPoolExecutor(1, "optimize") as thread:
        future = thread.submit(optimize)
        try:
            future.result()
        except BaseException as error:
            if not isinstance(error, Exception):
                objective.stop(error)
            raise


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
