"""`sparsetune metrics`: metrics of existing videos, without a model."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import click

from sparsetune.cli import options
from sparsetune.cli.console import current_log, only_results_on_stdout
from sparsetune.cli.main import Command
from sparsetune.files import json_text


@click.command(cls=Command, name="metrics", shows_progress=True)
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("sparse", type=click.Path(path_type=Path), required=False)
@click.option(
    "--align",
    type=click.Choice(["strict", "shortest"]),
    default="strict",
    help="strict requires equal frame counts; shortest ignores the frames that only one has.  [default: strict]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail where colour tags, frame rate, rotation, alpha or bit depth differ.  [default: off, a note]",
)
@options.metric_options
@options.gate_options
@options.file_options
@options.require_gate_option
@options.json_option("the result")
@click.pass_context
def command(
    ctx: click.Context,
    dense: Path,
    sparse: Path | None,
    align: str,
    strict: bool,
    require_gate: bool,
    as_json: bool,
) -> None:
    """Compare the videos or pictures DENSE and SPARSE: two files, or two folders.

    Of folders, NAME_dense is paired with NAME_sparse, or else files of the same names; one folder alone must hold both
    kinds, as `sparsetune eval` writes them. A gate is checked only where one of its bounds or --config is given.

    \b
    Examples:
      sparsetune metrics dense.mp4 sparse.mp4
      sparsetune metrics results/demo/eval/videos
      sparsetune metrics before/ after/ --align shortest --min-psnr 30 --json
    """
    from sparsetune.cli.tables import comparison_text, metric_text
    from sparsetune.errors import GateError, UsageError
    from sparsetune.evaluation.videos import NO_BOUNDS, Align, VideoPair, compare_videos
    from sparsetune.metrics import load_metrics

    def on_pair(number: int, count: int, pair: VideoPair) -> None:
        if count > 1:
            values = ", ".join(metric_text(name, value) for name, value in pair.metrics.items())
            current_log().event("pair", f"{number}/{count} {pair.name}: {values}", name=pair.name, metrics=pair.metrics)

    if sparse is None and dense.is_file():
        raise UsageError(f"{dense} has nothing to be compared with; pass a second file, or one folder with both kinds")
    config = options.build_config(ctx)
    load_metrics(config.eval.metric_modules, config.eval.lpips_weights)
    bounds = options.given_bounds(ctx, config)
    if require_gate and not bounds:
        raise UsageError("--require-gate needs a bound, such as --min-psnr 35, or --config")
    with only_results_on_stdout():
        result = compare_videos(
            dense,
            sparse or dense,
            names=config.eval.metrics,
            gate=replace(NO_BOUNDS, **bounds) if bounds else None,
            align=cast(Align, align),
            strict=strict,
            on_pair=on_pair,
        )
    click.echo(json_text(result.to_dict()) if as_json else comparison_text(result))
    if require_gate and result.gate is not None and not result.gate.passed:
        raise GateError(f"the gate is not met: {'; '.join(result.gate.failures)}")
