"""What a tuning came to, as its run's description."""

from collections.abc import Mapping

from sparsetune.evaluation.result import EvaluationResult
from sparsetune.tracking.runs import text
from sparsetune.tuning.events import TrialResult, TuningResult


def study_text(result: TuningResult, runs: Mapping[int, str], page: str) -> str:
    """Write a tuning's outcome in markdown, with a link to each trial's run.

    Args:
        result: of the study.
        runs: the run id of each recorded trial, by number.
        page: the experiment's page in MLflow's UI, e.g. `#/experiments/1`.
    """
    lines = [f"# {result.study_name}", "", _headline(result, runs, page), ""]
    if result.evaluation is not None:
        lines += [_verdict(result.evaluation), ""]
    if result.incidents:
        lines += ["What happened to workers:", "", *(f"- {one.time}: {one.text}" for one in result.incidents), ""]
    lines += ["| trial | state | sparsity | PSNR, dB | worst | parameters or reason |", "| --- " * 6 + "|"]
    ranked = sorted(result.trials, key=lambda trial: (not trial.feasible, -(trial.sparsity or 0.0)))
    return "\n".join(lines + [_row(trial, runs, page) for trial in ranked]) + "\n"


def _headline(result: TuningResult, runs: Mapping[int, str], page: str) -> str:
    if result.best is not None:
        return f"Winner: {_link(result.best, runs, page)}, {_parameters(result.best)}."
    if result.closest is not None:
        return f"No trial meets the gate; the closest is {_link(result.closest, runs, page)}."
    return "No trial meets the gate."


def _verdict(evaluation: EvaluationResult) -> str:
    gate = "passed" if evaluation.gate.passed else f"failed ({'; '.join(evaluation.gate.failures)})"
    psnr = evaluation.statistics.get("psnr")
    figures = f", PSNR {psnr.mean:.2f} dB, worst {psnr.min:.2f}" if psnr else ""
    return (
        f"On eval prompts: {evaluation.verdict}, gate {gate}, sparsity {_number(evaluation.sparsity.overall)}{figures}."
    )


def _row(trial: TrialResult, runs: Mapping[int, str], page: str) -> str:
    state = "meets the gate" if trial.feasible else trial.state
    figures = (_number(value) for value in (trial.sparsity, trial.psnr, trial.psnr_worst))
    note = (trial.reason or _parameters(trial)).replace("|", "/")
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
