"""What a search came to, as text and as JSON."""

from dataclasses import asdict
from typing import Any

import click

from sparsetune.cli.clock import clock
from sparsetune.cli.colour import outcome
from sparsetune.cli.tables import Table, before_after_text, evaluation_text, table_text
from sparsetune.cli.tuning_display import trial_text
from sparsetune.tuning.events import Insight, TrialResult, TuningResult
from sparsetune.tuning.search.ranking import pareto_front


def tuning_text(result: TuningResult) -> str:
    """Every trial in a line, the winner with its thresholds' parameters, and its evaluation."""
    lines = [table_text(trials_table(result)), ""] if result.trials else []
    if result.incidents:
        lines += ["what happened to workers:", *(f"  {one.time}: {one.text}" for one in result.incidents), ""]
    if result.best is None:
        left = result.left_to or "no trial meets the gate"
        return "\n".join([*lines, f"study {result.study_name}, {clock(result.seconds)}; {left}"])
    params = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.best.params.items()
    )
    word = "winner" if result.left_to is None else "best so far"
    lines.append(f"{word}: trial {result.best.number}, {trial_text(result.best)}, on the tune prompts ({params})")
    front = ", ".join(str(trial.number) for trial in pareto_front(result.trials))
    lines.append(f"Pareto front of sparsity and psnr, sparsest first: trials {front}")
    lines += _insight_lines(result.insight)
    if result.evaluation is not None:
        lines += ["", "the winner on the eval prompts:", evaluation_text(result.evaluation)]
    if result.comparison is not None:
        lines += ["", "SpargeAttn's default thresholds (before) and the winner (after) on the eval prompts:"]
        lines.append(before_after_text(result.comparison))
    lines += ["", f"study {result.study_name}, {clock(result.seconds)}"]
    lines.append(result.left_to or f"checkpoint: {result.checkpoint_path}")
    return "\n".join(lines)


def _insight_lines(insight: Insight | None) -> list[str]:
    """The search's own figures, as far as there are any."""
    lines = []
    if insight is not None and insight.rank_correlation is not None:
        lines.append(f"calibrated error against PSNR over the trials: rank correlation {insight.rank_correlation:.2f}")
    if insight is not None and insight.importances:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in list(insight.importances.items())[:5])
        lines.append(f"what set the best trials apart: {shares}")
    return lines


def trials_table(result: TuningResult) -> Table:
    """Each trial's outcome and figures on the tune prompts; the winner is marked."""
    rows = []
    for trial in result.trials:
        mark = " *" if result.best is not None and trial.number == result.best.number else ""
        gate = "" if trial.state != "complete" else "met" if trial.feasible else "missed"
        figures = [
            _figure(trial.sparsity, 3),
            _figure(trial.psnr, 2),
            _figure(trial.psnr_worst, 2),
            _figure(trial.frame_cosine, 4),
        ]
        row = [f"{trial.number}{mark}", outcome(trial.state), *figures, outcome(gate), clock(trial.seconds)]
        rows.append([click.style(row[0], bold=True), *row[1:]] if mark else row)
    return (
        "trial", "state", "sparsity", "psnr (dB)", "worst psnr (dB)", "frame_cosine", "gate", "time (m:ss)"
    ), rows  # fmt: skip


def outcome_dict(result: TuningResult) -> dict[str, Any]:
    """Give the outcome as JSON's value; trials are numbered from 0, as in the study."""
    return {
        "schema_version": 1,
        "study_name": result.study_name,
        "seconds": result.seconds,
        "interrupted": result.interrupted,
        "best_trial": None if result.best is None else result.best.number,
        "closest_trial": None if result.closest is None else result.closest.number,
        "left_to": result.left_to,
        "checkpoint_path": None if result.checkpoint_path is None else str(result.checkpoint_path),
        "pareto_front": [trial.number for trial in pareto_front(result.trials)],
        "incidents": [asdict(incident) for incident in result.incidents],
        "calibration_path": None if result.calibration_path is None else str(result.calibration_path),
        "trials": [_trial_dict(trial) for trial in result.trials],
        "rank_correlation": None if result.insight is None else result.insight.rank_correlation,
        "importances": {} if result.insight is None else dict(result.insight.importances),
        "before": None if result.before is None else result.before.to_dict(),
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
        "comparison": None if result.comparison is None else result.comparison.to_dict(),
    }


def _trial_dict(trial: TrialResult) -> dict[str, Any]:
    names = ("number", "state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds")
    return {name: getattr(trial, name) for name in names} | {"params": dict(trial.params)}


def _figure(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
