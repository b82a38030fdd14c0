"""A tuning study as one MLflow run, with a child run a trial."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sparsetune.evaluation.pair import PromptResult
from sparsetune.tracking.evaluation import (
    log_checkpoint,
    prompt_metrics,
    result_metrics,
    sparsity_metrics,
    threshold_rows,
)
from sparsetune.tracking.runs import Run, Status, flatten, metric_entries, text
from sparsetune.tracking.store import without_password
from sparsetune.tuning.events import StudyStarted, TrialResult, TuningResult

STATUS: Mapping[str, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""How MLflow's UI shows a trial: one that was pruned was stopped on purpose."""


def log_study_start(run: Run, event: StudyStarted) -> None:
    """Write what is searched: the configuration as parameters, without where things are kept.

    Of a study that goes on, only parameters that weren't written before are: MLflow lets none of them change.
    """
    config = {section: values for section, values in event.config.items() if section not in ("tracking", "cache")}
    params = {name: value for name, value in flatten(config).items() if name != "tune.storage"}
    params |= {"prompts": event.prompts, "num_inference_steps": event.num_steps}
    known = run.params() if event.num_done else {}
    run.log(
        params={name: value for name, value in params.items() if name not in known},
        tags={
            "storage": without_password(event.storage),
            "n_trials": event.n_trials,
            "resumed_at": event.num_done or None,
        },
    )


def trial_runs(study: Run) -> dict[int, str]:
    """Read the run ids of a study's trials by number; of a trial recorded twice, the newer one."""
    found = {}
    for run in reversed(study.children()):
        number = run.data.params.get("trial")
        if number is not None:
            found[int(number)] = str(run.info.run_id)
    return found


def log_trial(run: Run, trial: TrialResult) -> None:
    """Write a trial, all at once: parameters, metrics a prompt as steps, their means, sparsity, state and reason."""
    metrics = metric_entries(trial_metrics(trial))
    for step, prompt in enumerate(trial.prompts):
        metrics += metric_entries(prompt_metrics(prompt), step)
    run.log(
        metrics,
        params={"trial": trial.number, **trial.params},
        tags={"state": trial.state, "reason": trial.reason, "feasible": trial.feasible},
    )
    run.log_tables({"thresholds.json": threshold_rows(trial.policy)})


def log_study_end(run: Run, result: TuningResult, runs: Mapping[int, str]) -> None:
    """Write the winner: its metrics and parameters, checkpoint, evaluation, and a table of all trials.

    The winner's parameters are tags, which may change when the study goes on.

    Args:
        run: the study's.
        result: of the study.
        runs: the run id of each recorded trial, by number.
    """
    states: list[str] = [trial.state for trial in result.trials]
    metrics: dict[str, float | None] = {f"trials/{state}": float(states.count(state)) for state in STATUS}
    tags: dict[str, object] = {"interrupted": result.interrupted}
    for word, trial in (("best", result.best), ("closest", result.closest)):
        # Written even where there is none: the study may have had one when it was interrupted.
        tags[f"{word}.trial"] = "none" if trial is None else trial.number
        tags[f"{word}.run_id"] = "none" if trial is None else runs.get(trial.number, "unknown")
        tags[f"{word}.params"] = [f"{name}={text(value)}" for name, value in trial.params.items()] if trial else "none"
    if result.best is not None:
        metrics |= trial_metrics(result.best)
    if result.evaluation is not None:
        metrics |= {f"eval/{name}": value for name, value in result_metrics(result.evaluation).items()}
        tags["eval.verdict"] = result.evaluation.verdict
        tags["eval.gate"] = "passed" if result.evaluation.gate.passed else "failed"
    run.log(metrics | {"seconds/total": result.seconds}, tags=tags)
    run.log_tables({"trials.json": [_trial_row(trial) for trial in result.trials]})
    if result.checkpoint_path is not None:
        log_checkpoint(run, result.checkpoint_path)
    if result.calibration_path.exists():
        run.log_file(result.calibration_path, "calibration")


def trial_metrics(trial: TrialResult) -> dict[str, float | None]:
    """Name a trial's numbers as an evaluation's are, e.g. `psnr/mean`, over the prompts that rendered."""
    prompts: Sequence[PromptResult] = [prompt for prompt in trial.prompts if prompt.metrics]
    # What is known of a trial that an earlier process ran; its prompts' own numbers come on top.
    metrics: dict[str, float | None] = {
        "psnr/mean": trial.psnr,
        "psnr/min": trial.psnr_worst,
        "frame_cosine/mean": trial.frame_cosine,
    }
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.metrics):
        values = [prompt.metrics[name] for prompt in prompts if name in prompt.metrics]
        metrics |= {f"{name}/mean": fmean(values), f"{name}/min": min(values), f"{name}/max": max(values)}
    stats = [prompt.stats for prompt in prompts if prompt.stats is not None]
    pooled = stats[0].merged(stats[1:]) if stats else None
    active = pooled.sparsity_active if pooled else None
    metrics |= sparsity_metrics(trial.sparsity, active, pooled.by_layer if pooled else {})
    return metrics | {"seconds/total": trial.seconds}


def trial_started_ms(trial: TrialResult) -> int:
    """Tell when a trial that has just ended began, in milliseconds since 1970, as MLflow counts."""
    return int(1000 * (time.time() - trial.seconds))


def _trial_row(trial: TrialResult) -> dict[str, Any]:
    outcome = {name: getattr(trial, name) for name in ("sparsity", "psnr", "psnr_worst", "frame_cosine")}
    return {
        "trial": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "feasible": trial.feasible,
        **outcome,
        "seconds": trial.seconds,
        **trial.params,
    }
