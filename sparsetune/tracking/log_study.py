"""A tuning study as one MLflow run, with a child run a trial."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from sparsetune.attention.device import device_name, device_of
from sparsetune.config.files import flatten
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.report_markdown import cell, gain_section
from sparsetune.files import scratch_folder
from sparsetune.metrics import score_prompts, verdict
from sparsetune.tracking.log_evaluation import (
    log_checkpoint,
    prompt_metrics,
    result_metrics,
    threshold_tables,
    verdict_line,
)
from sparsetune.tracking.run_logger import RunLogger, Status, metric_entries, prompt_set, text
from sparsetune.tuning.events import SearchStatistics, StudyStarted, TrialResult, TuningResult, Validation
from sparsetune.urls import without_credentials


def study_text(result: TuningResult, runs: Mapping[int, str], page: str) -> str:
    """Describe a tuning in Markdown; `runs` has run ids by trial, `page` is e.g. `#/experiments/1`."""
    evaluation = result.evaluation
    lines = [] if evaluation is None else [f"On eval prompts: {verdict_line(evaluation)}", ""]
    lines += [_headline(result, runs, page), ""]
    if result.validations:
        lines += [f"On {result.validations[0].num_prompts} validation prompts: {_validated(result.validations)}.", ""]
    lines += [f"# {result.study_name}", ""]
    if evaluation is not None:
        lines += [gain_section(evaluation), ""]
    if result.incidents:
        lines += ["Worker incidents:", "", *(f"- {one.time}: {one.text}" for one in result.incidents), ""]
    lines += ["| trial | state | sparsity | PSNR, dB | worst | parameters or reason |", "| --- " * 6 + "|"]
    ranked = sorted(result.trials, key=lambda trial: (not trial.feasible, -(trial.sparsity or 0.0)))
    return "\n".join(lines + [_row(trial, runs, page) for trial in ranked]) + "\n"


def _headline(result: TuningResult, runs: Mapping[int, str], page: str) -> str:
    if result.best is not None:
        return f"Winner: {_link(result.best, runs, page)}, {_parameters(result.best)}."
    if result.dense_because is not None:
        return f"No policy is faster than the dense model at the gate: {result.dense_because}."
    if result.closest is not None:
        return f"No trial meets the gate; the closest is {_link(result.closest, runs, page)}."
    return "No trial meets the gate."


def _validated(validations: Sequence[Validation]) -> str:
    return ", ".join(
        f"trial {one.number} {'meets' if one.feasible else 'misses'} the gate"
        + ("" if one.psnr is None else f" ({one.psnr:.1f} dB)")
        for one in validations
    )


def _row(trial: TrialResult, runs: Mapping[int, str], page: str) -> str:
    state = "meets the gate" if trial.feasible else trial.state
    figures = (_number(value) for value in (trial.sparsity, trial.psnr, trial.psnr_worst))
    note = cell(trial.reason or _parameters(trial))
    return f"| {_link(trial, runs, page)} | {state} | {' | '.join(figures)} | {note} |"


def _link(trial: TrialResult, runs: Mapping[int, str], page: str) -> str:
    run_id = runs.get(trial.number)
    return f"[trial {trial.number}]({page}/runs/{run_id})" if run_id else f"trial {trial.number}"


def _parameters(trial: TrialResult) -> str:
    return ", ".join(f"{name} = {text(_short(value))}" for name, value in trial.params.items())


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


STATUS: Mapping[str, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""How MLflow's UI shows a trial: one that was pruned was stopped on purpose."""


def log_study_start(run: RunLogger, event: StudyStarted, *, resumed: bool) -> None:
    """Log the configuration without storage locations; a resumed run's parameters can't change in MLflow."""
    config = {
        section: values for section, values in event.config.items() if section not in ("tracking", "cache", "engine")
    }
    params = {name: value for name, value in flatten(config).items() if name != "tune.storage"}
    params |= {"prompts": event.prompts, "num_inference_steps": event.num_steps}
    known = run.params() if resumed else {}
    run.log_inputs([prompt_set(event.prompts, str(event.config["tune"].get("prompt_file")), "tuning")])
    run.log(
        params={name: value for name, value in params.items() if name not in known},
        tags={
            "storage": without_credentials(event.storage),
            "n_trials": event.n_trials,
            "device": device_name(device_of(event.config["model"]["device"])),
            "resumed_at": event.num_done or None,
        },
    )


def trial_runs(study: RunLogger) -> dict[int, str]:
    """Read run ids by trial number; of a trial recorded twice, the newer run."""
    found = {}
    for run in reversed(study.children()):
        number = run.data.params.get("trial")
        if number is not None:
            found[int(number)] = str(run.info.run_id)
    return found


def log_trial(run: RunLogger, trial: TrialResult) -> None:
    metrics = metric_entries(trial_metrics(trial))
    for index, prompt in enumerate(trial.prompts):
        metrics += metric_entries(prompt_metrics(prompt), index + 1)
    tables = {"prompts.json": [_prompt_row(index, prompt) for index, prompt in enumerate(trial.prompts)]}
    layers = [
        {"index": index, "layer": name, "sparsity": value}
        for index, (name, value) in enumerate(trial_sparsity(trial).items())
    ]
    tables |= threshold_tables(trial.policy) | {"layers/sparsity_by_layer.json": layers}
    run.log(
        metrics,
        params={"trial": trial.number, **trial.params},
        tags={
            "state": trial.state,
            "reason": trial.reason,
            "feasible": trial.feasible,
            "gate": "passed" if trial.feasible else "failed",
            "verdict": None if (score := _score(trial)) is None else verdict(score),
            **_worker_tags(trial),
        },
        tables={name: rows for name, rows in tables.items() if rows},
    )
    _log_videos(run, trial)


def _score(trial: TrialResult) -> int | None:
    """Score of a complete trial, over the tune prompts."""
    rows = [prompt.metrics for prompt in trial.prompts]
    measured = rows and all({"frame_cosine", "psnr", "frame_l1"} <= row.keys() for row in rows)
    return score_prompts(rows) if measured and trial.state == "complete" else None


def _prompt_row(index: int, prompt: PromptResult) -> dict[str, Any]:
    times = {"seconds_dense": prompt.seconds_dense, "seconds_sparse": prompt.seconds_sparse}
    return {"number": index + 1, "prompt": prompt.prompt, **prompt.metrics, "sparsity": prompt.sparsity, **times}


def _log_videos(run: RunLogger, trial: TrialResult) -> None:
    """Log a trial's videos; the worst prompt's has the same name in every run, so that MLflow compares them."""
    named = {f"prompt_{index}_compare.mp4": video for index, video in trial.videos.items()}
    worst = trial.worst_prompt
    if worst is not None and worst in trial.videos:
        named = (named if len(named) > 1 else {}) | {"worst_compare.mp4": trial.videos[worst]}
        run.log(tags={"worst_prompt": f"{worst + 1}: {trial.prompts[worst].prompt}"})
    if named:
        with scratch_folder() as folder:
            for name, video in named.items():
                (folder / name).write_bytes(video)
            run.log_file(folder, "videos")


def log_study_end(run: RunLogger, result: TuningResult, runs: Mapping[int, str], page: str) -> None:
    """Log the result; the winner's parameters are tags, which may change when the study is resumed."""
    states: list[str] = [trial.state for trial in result.trials]
    metrics: dict[str, float | None] = {f"trials/{state}": float(states.count(state)) for state in STATUS}
    tags: dict[str, object] = {"interrupted": result.interrupted, "incidents": len(result.incidents) or None}
    for word, trial in (("best", result.best), ("closest", result.closest)):
        # Written even where there is none: the study may have had one when it was interrupted.
        tags[f"{word}.trial"] = "none" if trial is None else trial.number
        tags[f"{word}.run_id"] = "none" if trial is None else runs.get(trial.number, "unknown")
        tags[f"{word}.params"] = [f"{name}={text(value)}" for name, value in trial.params.items()] if trial else "none"
    if result.best is not None:
        best = trial_metrics(result.best)
        metrics |= {f"tune/{name}": best[name] for name in ("psnr/mean", "psnr/min", "sparsity/overall")}
    if result.evaluation is not None:
        metrics |= result_metrics(result.evaluation)
        tags["verdict"] = result.evaluation.verdict
        tags["gate"] = "passed" if result.evaluation.gate.passed else "failed"
    tables = {"trials.json": [_trial_row(trial, runs.get(trial.number)) for trial in result.trials]}
    if result.validations:
        tables["validation.json"] = [
            {name: value for name, value in asdict(validation).items() if name != "shortfalls"}
            for validation in result.validations
        ]
    if result.incidents:
        tables["incidents.json"] = [asdict(incident) for incident in result.incidents]
    if result.insight is not None:
        metrics |= insight_metrics(result.insight)
        shares = sorted(result.insight.importances.items(), key=lambda share: -share[1])
        tables |= {"importances.json": [{"parameter": name, "importance": share} for name, share in shares]}
    metrics |= {"seconds/total": result.seconds}
    if result.seconds_by_phase:
        phases = result.seconds_by_phase.items()
        tables["seconds_by_phase.json"] = [{"phase": phase, "seconds": seconds} for phase, seconds in phases]
    run.log(metrics, tags=tags, tables=tables)
    run.describe(study_text(result, runs, page), "trials.json")
    if result.checkpoint_path is not None:
        log_checkpoint(run, result.checkpoint_path, with_model=True)
    if result.comparison is not None:
        run.log_json(result.comparison.to_dict(), "comparison.json")
    if result.record_path is not None and result.record_path.exists():
        run.log_file(result.record_path)
    if result.calibration_path is not None and result.calibration_path.exists():
        run.log_file(result.calibration_path, "calibration")


def insight_metrics(insight: SearchStatistics) -> dict[str, float | None]:
    return {
        "insight/rank_correlation": insight.rank_correlation,
        "insight/seconds_error": insight.seconds_error,
    }


def trial_metrics(trial: TrialResult) -> dict[str, float | None]:
    """Return a trial's metrics, named as an evaluation's, e.g. `psnr/mean`, over the prompts that rendered."""
    prompts: Sequence[PromptResult] = [prompt for prompt in trial.prompts if prompt.metrics]
    # What is known of a trial that an earlier process ran; its prompts' own numbers come on top.
    metrics: dict[str, float | None] = {
        "psnr/mean": trial.psnr,
        "psnr/min": trial.psnr_worst,
        "frame_cosine/mean": trial.frame_cosine,
    }
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.metrics):
        values = [prompt.metrics[name] for prompt in prompts if name in prompt.metrics]
        metrics |= {f"{name}/mean": fmean(values), f"{name}/min": min(values)}
    stats = [prompt.stats for prompt in prompts if prompt.stats is not None]
    active = stats[0].merged(stats[1:]).sparsity_active if stats else None
    metrics |= {
        "sparsity/overall": trial.sparsity,
        "sparsity/active": active,
        "score": _score(trial),
        "gate_passed": None if trial.psnr is None else float(trial.feasible),
        "predicted_error": trial.predicted_error,
        "seconds/sparse": trial.seconds_sparse,
        "speedup/measured": trial.speedup,
        "blocks_run": trial.blocks_run,
    }
    return metrics | {"seconds/total": trial.seconds}


def _worker_tags(trial: TrialResult) -> dict[str, object]:
    worker = trial.worker
    if worker is None:
        return {}
    gpus = worker.gpus or None
    return {"worker": worker.index, "worker.host": worker.host, "worker.device": worker.device, "worker.gpu": gpus}


def trial_sparsity(trial: TrialResult) -> Mapping[str, float]:
    stats = [prompt.stats for prompt in trial.prompts if prompt.stats is not None]
    return stats[0].merged(stats[1:]).by_layer if stats else {}


def trial_started_ms(trial: TrialResult) -> int:
    """Compute when a trial that has just ended began, in milliseconds since 1970."""
    return int(1000 * (time.time() - trial.seconds))


def _trial_row(trial: TrialResult, run_id: str | None) -> dict[str, Any]:
    outcome = {name: getattr(trial, name) for name in ("sparsity", "psnr", "psnr_worst", "frame_cosine")}
    return {
        "trial": trial.number,
        "run_id": run_id,
        "state": trial.state,
        "reason": trial.reason,
        "feasible": trial.feasible,
        **outcome,
        "seconds": trial.seconds,
        **trial.params,
    }
