"""A whole tuning: policies found by one of the tuners, the winner saved and judged on other prompts."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparsetune.attention.policy import Policy
from sparsetune.config import Config
from sparsetune.evaluation.compare import compare
from sparsetune.tuning.context import TimeIsUp, TuningContext, calibration_signature, digest, open_context
from sparsetune.tuning.events import Parameter, PhaseClock, TrialResult, TuningListener, TuningResult, notify
from sparsetune.tuning.prepare import prepare, refined_policy
from sparsetune.tuning.record import RECORD_NAME, TuningRecord, save_record
from sparsetune.tuning.search.objective import TrialRunner
from sparsetune.tuning.search.run import search
from sparsetune.tuning.sparge_builtin import check_builtin, run_builtin
from sparsetune.tuning.winner import EVALUATION, Found, WinnersFolder, judge, save


def calibrated(context: TuningContext) -> Found:
    """Calibrate, and search the sparsest policy with every head's error within `tune.l1` and `tune.pv_l1`."""
    name = _start(context)
    tune = context.config.tune
    try:
        prepared = prepare(context, probe=False)
        policy = refined_policy(context, prepared.curves)
        trial = _tried(context, policy, {"l1": tune.l1, "pv_l1": tune.pv_l1})
    except TimeIsUp:
        return Found(name, (), None)
    return _found(name, trial, prepared.path)


def built_in(context: TuningContext) -> Found:
    """Run SpargeAttn's own search with the bounds `tune.l1` and `tune.pv_l1`."""
    name = _start(context)
    tune = context.config.tune
    trial = _tried(context, run_builtin(context), {"l1": tune.l1, "pv_l1": tune.pv_l1})
    return _found(name, trial, None)


def _start(context: TuningContext) -> str:
    config = context.config
    bounds = {"l1": config.tune.l1, "pv_l1": config.tune.pv_l1}
    name = f"{config.model.name}-{config.tune.tuner}-{digest(calibration_signature(context) | bounds)[:8]}"
    context.start(name, storage="", n_trials=1)
    return name


def _tried(context: TuningContext, policy: Policy, params: Mapping[str, Parameter]) -> TrialResult:
    """Render the tune prompts under the policy: its one trial."""
    result = TrialRunner.of(context).run(0, params, policy)
    notify(context.listeners, lambda listener: listener.on_trial(result))
    return result


def _found(name: str, trial: TrialResult, path: Path | None) -> Found:
    return Found(name, (trial,), trial if trial.state == "complete" and trial.sparsity else None, path)


_TUNERS = {"optuna": search, "calibrate": calibrated, "builtin": built_in}


def tune(config: Config, *, output_dir: Path, listeners: Sequence[TuningListener] = ()) -> TuningResult:
    """Find a policy with the configuration's tuner, save it as a checkpoint and judge it.

    `optuna` searches for the sparsest policy whose videos pass the gate on the tune prompts; `calibrate` and `builtin`
    give the policy within `tune.l1` and `tune.pv_l1`. The winner and SpargeAttn's default thresholds are judged on the
    eval prompts, which no tuner saw.

    Args:
        config: the configuration; its `tune` section says how to search.
        output_dir: gets `checkpoint/`, the winner's evaluation in `evaluation/`, the defaults' in `before/`, and all
            of the tuning as `tuning.json`.
        listeners: told what happens, in order.

    Returns:
        All trials and the winner. Where no trial of a search meets the gate there is no winner and nothing is saved;
        `closest` is then the trial that misses it by the least. Ctrl-C while trials run ends the search with the best
        so far. The one policy of the other tuners is the winner whatever the gate says. Of several processes on one
        study that write to one folder, one saves and judges the winner; `left_to` says so in the others' results.

    Raises:
        PromptError, ModelError, BackendError, ExecutorError, TuningError, GenerationError: what was asked for can't be
            done.
    """
    if config.tune.tuner == "builtin":
        check_builtin(parallel=config.tune.parallel_tune)
    clock = PhaseClock()
    context, folder = open_context(config, output_dir, (clock, *listeners)), WinnersFolder(output_dir)
    clock.restart(context.started)
    try:
        result = _result(context, _TUNERS[config.tune.tuner](context), folder)
        result = replace(result, seconds_by_phase=clock.stop())
        if result.left_to is None:
            result = replace(result, record_path=output_dir / RECORD_NAME)
            save_record(TuningRecord.of(result, config), output_dir / RECORD_NAME)
    except BaseException as error:
        failure = error
        context.executor.cancel_all()
        notify(context.listeners, lambda listener: listener.on_failure(failure))
        raise
    finally:
        context.executor.close()
    notify(context.listeners, lambda listener: listener.on_study_end(result))
    return result


def _result(context: TuningContext, found: Found, folder: WinnersFolder) -> TuningResult:
    """Give what a tuner found, judged where no other process of the study does that."""
    result = replace(found.result(time.perf_counter() - context.started), incidents=context.executor.incidents)
    if found.num_elsewhere:
        trials = "1 trial still runs" if found.num_elsewhere == 1 else f"{found.num_elsewhere} trials still run"
        return replace(result, left_to=f"{trials} in other processes of the study, the last of which judges the winner")
    if found.best is None:
        return result
    with folder.take(found.study_name, found.best.number) as ours:
        if not ours:
            return replace(result, left_to=f"another process of the study saves and judges it in {context.output_dir}")
        return _judged(context, found.study_name, found.best, result)


def _judged(context: TuningContext, study_name: str, best: TrialResult, result: TuningResult) -> TuningResult:
    """Save the winner, and judge it and SpargeAttn's default thresholds on the eval prompts."""
    saved = save(context, study_name, best)
    notify(context.listeners, lambda listener: listener.on_winner(best, saved))
    before = judge(context, None, "before")
    after = judge(context, best.policy, EVALUATION, saved)
    return replace(
        result,
        checkpoint_path=saved,
        before=before,
        evaluation=after,
        comparison=compare(before, after),
        seconds=time.perf_counter() - context.started,
        incidents=context.executor.incidents,
    )
