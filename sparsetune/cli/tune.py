"""`sparsetune tune`: thresholds searched for a model."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli.command import Command
from sparsetune.cli.failures import current_log, say, say_loading
from sparsetune.cli.settings import (
    build_config,
    cache_options,
    config_options,
    engine_options,
    gate_options,
    generation_options,
    metric_options,
    model_options,
    setting,
    settings,
    tracking_options,
)
from sparsetune.config import Config

if TYPE_CHECKING:
    from sparsetune.tuning.events import TrialResult, TuningListener, TuningResult


@click.command(
    cls=Command,
    name="tune",
    shows_progress=True,
    short_help="Search thresholds for a model; leave the best as a checkpoint.",
)
@config_options
@settings("tune.tuner", "tune.n_trials", "tune.max_minutes", "tune.num_prompts", "tune.prompt_file", "tune.seed")
@setting("eval.num_prompts", "--num-eval-prompts", help="Prompts to judge the winner by, from the top of the file")
@setting("eval.prompt_file", "--eval-prompt-file", help="Prompts to judge the winner by, one a line")
@settings("tune.sampler", "tune.objective", "tune.space", "tune.granularity", "tune.schedule")
@settings("tune.orders", "tune.rules", "tune.keep_text", "tune.skip_pv", "tune.select_partial")
@settings("tune.calibration_steps", "tune.probe_prompts", "tune.margin_db", "tune.l1", "tune.pv_l1")
@settings("tune.parallel_tune", "tune.storage", "tune.study_name")
@metric_options
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the winner: checkpoint/ and its evaluation.  [default: results/MODEL]",
)
@generation_options
@model_options
@gate_options
@cache_options
@engine_options
@tracking_options
@setting("engine.mixed_gpus")
@click.option(
    "--require-gate",
    is_flag=True,
    help="Exit with status 3 where the winner fails on eval prompts.  [default: off]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Measure a dense and a sparse step, print what each tuner will cost, and end.  [default: off]",
)
@click.option(
    "--from-manifest",
    type=click.Path(path_type=Path, exists=True),
    metavar="CHECKPOINT",
    help="Repeat the search that made a checkpoint, with its settings.  [default: none]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON, alone on stdout.  [default: off]")
@click.pass_context
def command(
    ctx: click.Context,
    output_dir: Path | None,
    require_gate: bool,
    dry_run: bool,
    from_manifest: Path | None,
    as_json: bool,
) -> None:
    """Search for the sparsest thresholds and dense steps whose videos pass the gate, and judge the winner.

    Trials are kept: the same command takes up where it was interrupted. The winner is saved as a checkpoint and
    measured, beside SpargeAttn's default thresholds, on prompts that it wasn't tuned on.

    Several processes may work on one study, here or on many hosts: give the same command to each, with a --storage that
    all of them reach.

    \b
    Examples:
      sparsetune tune --model demo
      sparsetune tune --model cogvideox-2b --dry-run
      sparsetune tune --model cogvideox-2b --n-trials 60 --max-minutes 600
      sparsetune tune --model cogvideox-2b --tuner calibrate --l1 0.06
      sparsetune tune --model cogvideox-2b --engine ray --workers 8
      sparsetune tune --model cogvideox-2b --storage journal:/shared/study.log
    """
    from sparsetune.cli.terminal import results_alone
    from sparsetune.cli.tuning_text import outcome_dict, tuning_text
    from sparsetune.tuning import tune

    config = build_config(ctx)
    if from_manifest is not None:
        from sparsetune.tuning.reproduce import config_from_manifest

        config = config_from_manifest(from_manifest, config)
    if dry_run:
        _print_cost(config, as_json)
        return
    folder = output_dir or config.model.results_folder
    with results_alone():
        say_loading(config.model.source)
        with _listeners(config) as listeners:
            result = tune(config, output_dir=folder, listeners=listeners)
    click.echo(json.dumps(outcome_dict(result), indent=2, ensure_ascii=False) if as_json else tuning_text(result))
    if result.interrupted:
        raise click.Abort
    _check_gate(result, require_gate)


def _print_cost(config: Config, as_json: bool) -> None:
    from sparsetune.cli.terminal import results_alone
    from sparsetune.cli.tuning_cost import cost_dict, cost_text
    from sparsetune.tuning.cost_estimate import estimate

    with results_alone():
        say_loading(config.model.source)
        say("measuring some steps of it ...")
        cost = estimate(config)
    click.echo(json.dumps(cost_dict(cost), indent=2) if as_json else cost_text(cost))


def _check_gate(result: "TuningResult", require_gate: bool) -> None:
    from sparsetune.cli.tuning_display import trial_text
    from sparsetune.errors import GateError

    if result.left_to is not None:
        return  # to whoever judges
    if not result.trials:
        raise GateError("a trial must meet the gate, but there was no time for any; raise --max-minutes")
    if result.best is None:
        closest = result.closest
        figures = "" if closest is None else f"; the closest is trial {closest.number}, {trial_text(closest)}"
        raise GateError(
            f"a trial must meet the gate, but none of {len(result.trials)} does{figures}{_missed(closest)}; the dense "
            "model stays the recommendation: allow more trials, or a lower gate"
        )
    if require_gate and result.evaluation is not None and not result.evaluation.gate.passed:
        failures = "; ".join(result.evaluation.gate.failures)
        raise GateError(f"the winner must pass the gate on the eval prompts, but: {failures}; allow more trials")


def _missed(trial: "TrialResult | None") -> str:
    """Say which bounds stopped a trial, and by how much."""
    if trial is None:
        return ""
    missed = [f"{name} by {missing:.3g}" for name, missing in trial.shortfalls.items() if missing > 0]
    return f", which misses {' and '.join(missed)}" if missed else ""


@contextlib.contextmanager
def _listeners(config: Config) -> "Iterator[Sequence[TuningListener]]":
    from sparsetune.cli.tuning_display import TuningDisplay

    with contextlib.closing(TuningDisplay(current_log())) as display:
        if not config.tracking.enabled:
            yield (display,)
            return
        from sparsetune.tracking import TrackingListener

        yield (display, TrackingListener(config))
