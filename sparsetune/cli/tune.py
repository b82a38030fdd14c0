"""`sparsetune tune`: search for thresholds of a model."""

import contextlib
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsetune.cli import completion, console, options
from sparsetune.cli.main import Command
from sparsetune.files import json_text

if TYPE_CHECKING:
    from sparsetune.cli.tables import Table
    from sparsetune.config import Config
    from sparsetune.tuning.cost_estimate import Cost
    from sparsetune.tuning.events import PerHeadGain, TrialResult, TuningResult


_ESSENTIAL = (
    "--model", "--set", "--num-prompts", "--prompt-file", "--n-trials", "--max-minutes", "--dry-run",
    "--num-inference-steps", "--min-psnr", "--output-dir",
)  # fmt: skip


@click.command(cls=Command, name="tune", shows_progress=True, essential=_ESSENTIAL)
@options.config_options
@options.settings(
    "tune.tuner", "tune.n_trials", "tune.max_minutes", "tune.num_prompts", "tune.prompt_file", "tune.seed"
)
@options.setting(
    "eval.num_prompts", "--num-eval-prompts", help="Prompts to evaluate the winner on, from the top of the file"
)
@options.setting("eval.prompt_file", "--eval-prompt-file", help="Prompts to evaluate the winner on, one a line")
@options.settings("tune.sampler", "tune.objective", "tune.space", "tune.granularity", "tune.schedule")
@options.settings("tune.caches", "tune.orders", "tune.rules", "tune.keep_text", "tune.skip_pv", "tune.select_partial")
@options.settings("tune.calibration_steps", "tune.probe_prompts", "tune.margin_db", "tune.l1", "tune.pv_l1")
@options.settings("tune.parallel_tune", "tune.storage", "tune.study_name")
@options.metric_options
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the winner's checkpoint/ and evaluation.  [default: results/MODEL]",
)
@options.run_options
@options.settings("tracking.trial_videos")
@options.setting("engine.mixed_gpus")
@click.option(
    "--require-gate",
    is_flag=True,
    help="Exit with status 3 if the winner fails the gate on the eval prompts.  [default: off]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Measure a dense and a sparse step, print the cost of each tuner, and exit.  [default: off]",
)
@click.option(
    "--from-manifest",
    shell_complete=completion.checkpoint,
    metavar="CHECKPOINT",
    help="Repeat the search that produced a checkpoint, with its settings.  [default: none]",
)
@options.language_option("the printed summary; zh is shorter")
@options.json_option("the outcome")
@click.pass_context
def command(
    ctx: click.Context,
    output_dir: Path | None,
    require_gate: bool,
    dry_run: bool,
    from_manifest: str | None,
    lang: str,
    as_json: bool,
) -> None:
    """Search for the fastest thresholds and dense steps whose videos pass the gate, and evaluate the winner.

    Without a GPU kernel, which alone turns sparsity into speed, the sparsest are searched.

    Trials are saved: after an interruption, run the same command to resume. The winner is saved as a checkpoint and
    evaluated, with SpargeAttn's default thresholds for comparison, on prompts that it was not tuned on.

    Several processes may work on one study, on one or many hosts: run the same command in each, with a --storage that
    all can reach.

    \b
    Examples:
      sparsetune tune --model demo
      sparsetune tune --model cogvideox-2b --dry-run
      sparsetune tune --model cogvideox-2b --n-trials 60 --max-minutes 600
      sparsetune tune --model cogvideox-2b --tuner calibrate --l1 0.06
      sparsetune tune --model cogvideox-2b --engine ray --workers 8
      sparsetune tune --model cogvideox-2b --storage journal:/shared/study.log
    """
    config = options.build_config(ctx)
    if from_manifest is None:
        options.check_inputs(config, config.tune, config.eval)
    from sparsetune.cli.tuning_progress import TuningProgress
    from sparsetune.tuning import tune

    if from_manifest is not None:
        from sparsetune.tracking.lookup import resolve_checkpoint
        from sparsetune.tuning.reproduce import config_from_manifest

        config = config_from_manifest(resolve_checkpoint(from_manifest, config), config)
    if dry_run:
        _print_cost(config, as_json)
        return
    folder = output_dir or config.model.results_folder
    progress = TuningProgress(console.current_log())
    console.global_options(ctx).answer = progress.answer
    with console.only_results_on_stdout(), contextlib.closing(progress.display):
        console.log_loading(config.model.source)
        result = tune(config, output_dir=folder, listeners=(progress, *options.tracking_listeners(config)))
    report = _report(config, result, lang)
    if as_json:
        click.echo(json_text(outcome_dict(result)))
    elif lang == "zh":
        click.echo("\n".join((chinese_text(result), *report)))
    else:
        text = tuning_text(result, verbose=console.current_log().verbose)
        click.echo("\n".join((text, *report, *_next_lines(config, result))))
    if result.interrupted:
        count = len(result.trials)
        raise click.Abort("1 trial saved" if count == 1 else f"{count} trials saved")
    _check_gate(result, require_gate)


def _report(config: "Config", result: "TuningResult", lang: str) -> list[str]:
    """Write report.html beside the record, and return the line that names it."""
    if result.record_path is None or not config.tracking.report:
        return []
    from sparsetune.report.build import report_beside
    from sparsetune.report.source import from_folder
    from sparsetune.report.words import words

    record, text = result.record_path, words("zh" if lang == "zh" else "en")
    return [text("summary.report", path=report_beside(lambda: from_folder(record), record.parent))]


def _next_lines(config: "Config", result: "TuningResult") -> list[str]:
    if result.evaluation is None:
        return []
    model = shlex.quote(config.model.source)
    if not result.evaluation.gate.passed:
        return [f"next: sparsetune tune --model {model} with more --n-trials, more --num-prompts or a lower gate"]
    if config.tracking.enabled:
        return [f"next: sparsetune review latest --model {model}"]
    return [f"next: sparsetune generate PROMPT --model {model} --checkpoint {result.checkpoint_path}"]


def _print_cost(config: "Config", as_json: bool) -> None:
    from sparsetune.tuning.cost_estimate import estimate

    with console.only_results_on_stdout():
        console.log_loading(config.model.source)
        console.log_note("measuring some denoising steps ...")
        cost = estimate(config)
    if config.model.compile:
        console.log_note("compilation, about a minute for each worker, is not in these times")
    click.echo(json_text(cost_dict(cost)) if as_json else cost_text(cost))


def _check_gate(result: "TuningResult", require_gate: bool) -> None:
    from sparsetune.cli.tables import trial_text
    from sparsetune.errors import GateError

    if result.left_to is not None:
        return  # another process evaluates the winner
    if result.dense_because is not None:
        raise GateError(
            f"no policy is faster than dense at the gate: {result.dense_because}; keep the dense model, or tune for "
            "sparsity with --objective sparsity"
        )
    if not result.trials:
        raise GateError("there was no time for a trial; raise --max-minutes")
    if result.best is None:
        closest = result.closest
        figures = f"; the closest is trial {closest.number}, {trial_text(closest)}{_missed(closest)}" if closest else ""
        raise GateError(
            f"none of {len(result.trials)} trials meets the gate{figures}; keep the dense model, or "
            "allow more trials or a lower gate"
        )
    if require_gate and result.evaluation is not None and not result.evaluation.gate.passed:
        failures = "; ".join(result.evaluation.gate.failures)
        raise GateError(f"the winner fails the gate on the eval prompts: {failures}; allow more trials")


def _missed(trial: "TrialResult") -> str:
    missed = [f"{name} by {missing:.3g}" for name, missing in trial.shortfalls.items() if missing > 0]
    return f", which misses {' and '.join(missed)}" if missed else ""


def tuning_text(result: "TuningResult", *, verbose: bool = False) -> str:
    """Format the winner, its gain, quality and gate; `verbose` adds all trials and the search's statistics."""
    from sparsetune.cli.tables import brief_lines, clock_text, trial_text

    if verbose:
        return _details_text(result)
    study = f"study {result.study_name}, {clock_text(result.seconds)}"
    if result.best is None:
        slower = "no policy is faster than dense" if result.dense_because else "no trial meets the gate"
        return f"{study}; {result.left_to or slower}"
    word = "winner" if result.left_to is None else "best so far"
    place = result.left_to or f"checkpoint: {result.checkpoint_path}"
    if result.evaluation is None:
        return f"{word}: trial {result.best.number}, {trial_text(result.best)}, on the tune prompts\n{study}\n{place}"
    first = f"{word}: trial {result.best.number} of {len(result.trials)}, {study}, {place}"
    lost = [f"workers lost or joined: {len(result.incidents)}; -v lists them"] if result.incidents else []
    lost += [] if result.per_head is None else [_per_head_text(result.per_head)]
    return "\n".join((first, *lost, *brief_lines(result.evaluation)))


def _details_text(result: "TuningResult") -> str:
    from sparsetune.cli.tables import clock_text, evaluation_text, table_text, trial_text
    from sparsetune.tuning.search.ranking import pareto_front

    lines = [table_text(_trials_table(result)), ""] if result.trials else []
    if result.incidents:
        lines += ["worker incidents:", *(f"  {one.time}: {one.text}" for one in result.incidents), ""]
    study = f"study {result.study_name}, {clock_text(result.seconds)}"
    if result.best is None:
        slower = "no policy is faster than dense" if result.dense_because else "no trial meets the gate"
        return "\n".join([*lines, f"{study}; {result.left_to or slower}"])
    params = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.best.params.items()
    )
    word = "winner" if result.left_to is None else "best so far"
    lines.append(f"{word}: trial {result.best.number}, {trial_text(result.best)}, on the tune prompts ({params})")
    if not result.best.policy.is_dense:
        front = ", ".join(str(trial.number) for trial in pareto_front(result.trials))
        lines.append(f"Pareto front of sparsity and psnr, sparsest first: trials {front}")
    lines += _insight_lines(result)
    if result.per_head is not None:
        lines.append(_per_head_text(result.per_head))
    if result.evaluation is not None:
        lines += ["", "the winner on the eval prompts:", evaluation_text(result.evaluation)]
    return "\n".join([*lines, "", study, result.left_to or f"checkpoint: {result.checkpoint_path}"])


def chinese_text(result: "TuningResult") -> str:
    from sparsetune.cli.tables import summary_text
    from sparsetune.report.summary import comparison_summary, evaluation_summary
    from sparsetune.report.words import words

    chinese = words("zh")
    if result.left_to is not None:
        return chinese("summary.left")
    if result.best is None:
        return chinese("summary.no_faster" if result.dense_because else "summary.no_winner", trials=len(result.trials))
    parts = [chinese("summary.winner", number=result.best.number)]
    if result.evaluation is not None:
        parts += ["", summary_text(evaluation_summary(result.evaluation, chinese))]
    if result.comparison is not None:
        parts += ["", chinese("compare.outcome"), summary_text(comparison_summary(result.comparison, chinese))]
    parts += ["", chinese("summary.study", study=result.study_name, seconds=round(result.seconds))]
    if result.checkpoint_path is not None:
        parts.append(chinese("summary.checkpoint", path=result.checkpoint_path))
    return "\n".join(parts)


def _per_head_text(gain: "PerHeadGain") -> str:
    seconds = ""
    if gain.seconds is not None and gain.per_head_seconds is not None:
        seconds = f" and {gain.per_head_seconds:.3g} s of denoising instead of {gain.seconds:.3g}"
    return (
        f"thresholds for each head would reach sparsity {gain.per_head_sparsity:.3f} instead of {gain.sparsity:.3f}"
        f"{seconds} at the same calibrated error (predicted; tune with --granularity group)"
    )


def _insight_lines(result: "TuningResult") -> list[str]:
    insight, lines = result.insight, []
    if insight is None:
        return []
    if insight.rank_correlation is not None:
        lines.append(f"rank correlation of calibrated error and PSNR over the trials: {insight.rank_correlation:.2f}")
    if insight.seconds_error is not None:
        rho = "" if insight.seconds_correlation is None else f", rank correlation {insight.seconds_correlation:.2f}"
        lines.append(f"predicted seconds are {insight.seconds_error:.1%} off the measured ones on average{rho}")
    if insight.importances:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in list(insight.importances.items())[:5])
        lines.append(f"parameter importance: {shares}")
    return lines


def _trials_table(result: "TuningResult") -> "Table":
    from sparsetune.cli.tables import clock_text, number_text

    formats = {"sparsity": ".3f", "psnr": ".2f", "psnr_worst": ".2f", "frame_cosine": ".4f"}
    is_timed = any(trial.speedup is not None for trial in result.trials)
    is_cached = any("cache" in trial.params for trial in result.trials)
    rows = []
    for trial in result.trials:
        is_best = result.best is not None and trial.number == result.best.number
        number = click.style(f"{trial.number} *", bold=True) if is_best else str(trial.number)
        figures = [number_text(getattr(trial, name), form) for name, form in formats.items()]
        if is_timed:
            figures = [number_text(trial.seconds_sparse, ".2f"), number_text(trial.speedup, ".2f"), *figures]
        if is_cached:
            cache = "-" if trial.policy.cache is None else str(trial.policy.cache)
            figures = [cache, number_text(trial.blocks_run, ".2f"), *figures]
        gate = console.coloured_status("" if trial.state != "complete" else "met" if trial.feasible else "missed")
        rows.append([number, console.coloured_status(trial.state), *figures, gate, clock_text(trial.seconds)])
    cache_heads, time_heads = ("cache", "blocks run"), ("denoising (s)", "speed-up")
    return (
        "trial", "state", *(cache_heads if is_cached else ()), *(time_heads if is_timed else ()), "sparsity",
        "psnr (dB)", "worst psnr (dB)", "frame_cosine", "gate", "time (m:ss)",
    ), rows  # fmt: skip


def outcome_dict(result: "TuningResult") -> dict[str, Any]:
    from sparsetune.tuning.search.ranking import pareto_front

    parts = {"before": result.before, "evaluation": result.evaluation, "comparison": result.comparison}
    names = (
        "number", "state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds",
        "seconds_sparse", "seconds_dense", "speedup", "blocks_run",
    )  # fmt: skip
    return {
        "schema_version": 1,
        **{name: getattr(result, name) for name in ("study_name", "seconds", "interrupted", "left_to")},
        "best_trial": None if result.best is None else result.best.number,
        "closest_trial": None if result.closest is None else result.closest.number,
        "checkpoint_path": None if result.checkpoint_path is None else str(result.checkpoint_path),
        "pareto_front": [trial.number for trial in pareto_front(result.trials)],
        "incidents": [asdict(incident) for incident in result.incidents],
        "calibration_path": None if result.calibration_path is None else str(result.calibration_path),
        "trials": [
            {name: getattr(trial, name) for name in names} | {"params": dict(trial.params)} for trial in result.trials
        ],
        "dense_because": result.dense_because,
        "rank_correlation": None if result.insight is None else result.insight.rank_correlation,
        "importances": {} if result.insight is None else dict(result.insight.importances),
    } | {name: part and part.to_dict() for name, part in parts.items()}


def cost_text(cost: "Cost") -> str:
    from sparsetune.cli.tables import clock_text, table_text

    def time(seconds: float | None) -> str:
        return "-" if seconds is None else clock_text(seconds)

    measured = cost.measured
    rows = []
    for tuner in cost.tuners:
        rows.append([tuner.tuner, str(tuner.num_renderings), time(tuner.seconds), f"{tuner.peak_memory_gib:.1f} GiB"])
        rows += [[f"  {phase.name}", str(phase.num_renderings), time(phase.seconds), ""] for phase in tuner.phases]
    lines = [
        f"{cost.model} on {cost.device}, backend {cost.backend}: {measured.dense_step:.3g} s a dense step, "
        f"{measured.sparse_step:.3g} s a sparse step, {measured.fixed:.3g} s a rendering for the rest; "
        f"{cost.workload.num_steps} steps",
        "",
        table_text((("tuner and its phases", "renderings", "time (m:ss)", "peak memory"), rows)),
        "",
        *(f"{tuner.tuner}: {tuner.note}" for tuner in cost.tuners if tuner.note),
    ]
    if cost.max_minutes is not None:
        lines.append(f"--max-minutes {cost.max_minutes:g} ends a search earlier, with the best so far")
    return "\n".join(lines)


def cost_dict(cost: "Cost") -> dict[str, Any]:
    """Return the cost for JSON; seconds are null where they are unknown."""
    value = asdict(cost)
    for row, tuner in zip(value["tuners"], cost.tuners, strict=True):
        row |= {"num_renderings": tuner.num_renderings, "seconds": tuner.seconds}
    return {"schema_version": 1} | value
