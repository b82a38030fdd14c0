"""`sparsetune eval`: evaluation of a policy on rendered videos."""

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsetune.cli import options
from sparsetune.cli.console import current_log, global_options, log_loading, only_results_on_stdout, print_json
from sparsetune.cli.main import Command

if TYPE_CHECKING:
    from sparsetune.config import Config
    from sparsetune.evaluation.result import EvaluationResult

_ESSENTIAL = (
    "--model", "--set", "--use-tuned", "--checkpoint", "--num-prompts", "--prompt-file", "--metrics", "--min-psnr",
    "--output-dir", "--json",
)  # fmt: skip


@click.command(cls=Command, name="eval", shows_progress=True, essential=_ESSENTIAL)
@options.config_options
@click.option(
    "--use-tuned",
    is_flag=True,
    help="Evaluate the checkpoint of `sparsetune tune`.  [default: off, SpargeAttn's default thresholds]",
)
@options.checkpoint_option("evaluate", "none; with --use-tuned results/MODEL/checkpoint")
@options.sparsity_option
@options.settings(
    "eval.num_prompts",
    "eval.prompt_file",
    "eval.seed",
    "eval.output_dir",
    "eval.save_videos",
    "eval.ladder",
)
@options.setting("eval.yardsticks", metavar="NAMES", bare="all")
@options.metric_options
@options.run_options
@options.settings("break_even")
@click.option("--difference", is_flag=True, help="Add the amplified difference to side-by-side videos.  [default: off]")
@click.option("--no-reuse", is_flag=True, help="Render again what tune has evaluated alike.  [default: off]")
@options.require_gate_option
@options.language_option("the printed summary; zh is shorter")
@options.json_option("the result")
@click.pass_context
def command(
    ctx: click.Context,
    use_tuned: bool,
    checkpoint: str | None,
    sparsity: float | None,
    difference: bool,
    no_reuse: bool,
    require_gate: bool,
    lang: str,
    as_json: bool,
) -> None:
    """Render prompts dense and sparse from the same seed, and measure how sparsity changes the videos.

    Without a checkpoint it evaluates SpargeAttn's default thresholds, the baseline of any tuning. Writes the result
    as JSON, a report, and dense, sparse and side-by-side videos to the output folder. What `sparsetune tune` evaluated
    with the same policy, prompts, seed, settings and versions is copied instead of rendered again.

    \b
    Examples:
      sparsetune eval --model demo --output-dir results/demo/before
      sparsetune eval --model demo --use-tuned --num-prompts 4
      sparsetune eval --checkpoint tuned.pt --metric-module my_metrics.py
      sparsetune eval --checkpoint models:/demo-sparse@champion
      sparsetune eval --use-tuned --sparsity 0.4
    """
    config = options.build_config(ctx)
    output_dir = config.eval.output_dir or config.model.results_folder / "eval"
    checkpoint = options.local_checkpoint(checkpoint, config, use_tuned)
    options.check_inputs(config, config.eval, checkpoint=checkpoint)
    from sparsetune.cli.evaluation_progress import EvaluationProgress
    from sparsetune.cli.progress import ProgressDisplay
    from sparsetune.cli.tables import brief_lines, evaluation_text, summary_text
    from sparsetune.errors import GateError, GenerationError
    from sparsetune.evaluation.evaluate import evaluate_config
    from sparsetune.report.build import report_beside
    from sparsetune.report.source import Files, Source
    from sparsetune.report.words import words

    folders = () if no_reuse or difference else _folders_of_tune(config, checkpoint, sparsity)
    tuned = options.at_sparsity(checkpoint, sparsity)
    progress = EvaluationProgress(ProgressDisplay(current_log(), f"eval {config.model.name}"))
    global_options(ctx).answer = lambda: "stopping, which takes some seconds; rendered dense videos are kept"
    with only_results_on_stdout(), contextlib.closing(progress.display):
        log_loading(config.model.source)
        listeners = (progress, *options.tracking_listeners(config))
        result = evaluate_config(config, tuned, output_dir, listeners, difference=difference, reuse=folders)
    if as_json:
        print_json(result.to_dict())
    elif lang == "zh":
        from sparsetune.report.summary import evaluation_summary

        click.echo(
            summary_text((*evaluation_summary(result, words("zh")), words("zh")("summary.files", path=output_dir)))
        )
    else:
        click.echo(evaluation_text(result) if current_log().verbose else "\n".join(brief_lines(result)))
        click.echo(f"result, report and videos: {output_dir}")
    if config.tracking.report:
        source, text = (
            Source(output_dir.name, result, files=Files.of(output_dir)),
            words("zh" if lang == "zh" else "en"),
        )
        report = text("summary.report", path=report_beside(lambda: source, output_dir))
        click.echo(report, err=as_json)
    if lang == "en" and not as_json:
        click.echo(f"next: {_next(config, result, checkpoint)}")
    if result.overall_score is None:
        raise GenerationError(f"all {len(result.failed)} prompts failed, the first with: {result.failed[0].error}")
    if require_gate and not result.gate.passed:
        raise GateError(f"the gate is not met: {'; '.join(result.gate.failures)}; tune for less sparsity")


def _folders_of_tune(config: "Config", checkpoint: str | None, sparsity: float | None) -> tuple[Path, ...]:
    """Return where `tune` put its evaluation of a checkpoint, or of the default thresholds."""
    if checkpoint is None:
        return (config.model.results_folder / "before",)
    return () if sparsity is not None else (Path(checkpoint).parent / "evaluation",)


def _next(config: "Config", result: "EvaluationResult", checkpoint: str | None) -> str:
    model = shlex.quote(config.model.source)
    if checkpoint is None:
        return f"sparsetune tune --model {model}"
    if not result.gate.passed:
        return f"sparsetune tune --model {model} with more --n-trials or a lower gate, or eval with a lower --sparsity"
    return f"sparsetune review latest --model {model}" if config.tracking.enabled else "look at the videos"
