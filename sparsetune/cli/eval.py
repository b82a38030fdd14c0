"""`sparsetune eval`: a policy judged on rendered video."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from sparsetune.cli.command import Command
from sparsetune.cli.failures import current_log, say_loading
from sparsetune.cli.settings import (
    build_config,
    cache_options,
    config_options,
    engine_options,
    gate_options,
    generation_options,
    metric_options,
    model_options,
    settings,
    tracking_options,
)
from sparsetune.config import Config

if TYPE_CHECKING:
    from sparsetune.evaluation.events import EvaluationListener


@click.command(
    cls=Command,
    name="eval",
    shows_progress=True,
    short_help="Render prompts dense and sparse, and judge the difference.",
)
@config_options
@click.option(
    "--use-tuned",
    is_flag=True,
    help="Judge the checkpoint that `sparsetune tune` left.  [default: off, SpargeAttn's default thresholds]",
)
@click.option(
    "--checkpoint",
    "--tuned-path",
    "checkpoint",
    metavar="PATH",
    help="Checkpoint to judge: a folder or file, models:/NAME@ALIAS, runs:/ID or a run id.  "
    "[default: none; with --use-tuned results/MODEL/checkpoint]",
)
@settings("eval.num_prompts", "eval.prompt_file", "eval.seed", "eval.output_dir", "eval.save_videos", "eval.ladder")
@metric_options
@generation_options
@model_options
@settings("break_even")
@gate_options
@cache_options
@engine_options
@tracking_options
@click.option("--difference", is_flag=True, help="Add the amplified difference to side-by-side videos.  [default: off]")
@click.option("--require-gate", is_flag=True, help="Exit with status 3 where the gate isn't met.  [default: off]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, alone on stdout.  [default: off]")
@click.pass_context
def command(
    ctx: click.Context,
    use_tuned: bool,
    checkpoint: str | None,
    difference: bool,
    require_gate: bool,
    as_json: bool,
) -> None:
    """Render prompts dense and sparse from the same seed, and judge what sparsity does to the videos.

    Without a checkpoint it judges SpargeAttn's default thresholds, the 'before' of any tuning. Leaves the result
    as JSON, a report, and dense, sparse and side-by-side videos in the output folder.

    \b
    Examples:
      sparsetune eval --model demo --output-dir results/demo/before
      sparsetune eval --model demo --use-tuned --num-prompts 4
      sparsetune eval --checkpoint tuned.pt --metric-module my_metrics.py
      sparsetune eval --checkpoint models:/demo-sparse@champion
    """
    from sparsetune.cli.stores import local_checkpoint
    from sparsetune.cli.tables import evaluation_text
    from sparsetune.cli.terminal import results_alone
    from sparsetune.errors import GateError, GenerationError
    from sparsetune.evaluation.evaluate import evaluate_config

    config = build_config(ctx)
    if use_tuned and checkpoint is None:
        checkpoint = str(config.model.results_folder / "checkpoint")
    output_dir = config.eval.output_dir or config.model.results_folder / "eval"
    checkpoint = local_checkpoint(checkpoint, config)
    with results_alone():
        say_loading(config.model.source)
        with _listeners(config) as listeners:
            result = evaluate_config(config, checkpoint, output_dir, listeners, difference=difference)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(evaluation_text(result))
        click.echo(f"result, report and videos: {output_dir}")
    if result.overall_score is None:
        raise GenerationError(
            f"at least one prompt must render, but all {len(result.failed)} failed, the first because "
            f"{result.failed[0].error}"
        )
    if require_gate and not result.gate.passed:
        raise GateError(f"the gate must be met, but: {'; '.join(result.gate.failures)}; tune for less sparsity")


@contextlib.contextmanager
def _listeners(config: Config) -> "Iterator[Sequence[EvaluationListener]]":
    from sparsetune.cli.display import EvaluationDisplay

    with contextlib.closing(EvaluationDisplay(current_log(), f"eval {config.model.name}")) as display:
        if not config.tracking.enabled:
            yield (display,)
            return
        from sparsetune.tracking import TrackingListener

        yield (display, TrackingListener(config))
