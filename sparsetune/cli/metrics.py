"""`sparsetune metrics`: existing videos compared, with no model."""

import json
from pathlib import Path
from typing import cast

import click

from sparsetune.cli.command import Command
from sparsetune.cli.failures import current_log
from sparsetune.cli.settings import build_config, file_options, gate_options, metric_options


@click.command(
    cls=Command,
    name="metrics",
    shows_progress=True,
    short_help="Compare existing videos, with no model.",
)
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("sparse", type=click.Path(path_type=Path))
@click.option(
    "--align",
    type=click.Choice(["strict", "shortest"]),
    default="strict",
    help="shortest compares as many frames as both videos have; strict wants equally many.  [default: strict]",
)
@metric_options
@gate_options
@file_options
@click.option("--require-gate", is_flag=True, help="Exit with status 3 where the gate isn't met.  [default: off]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, alone on stdout.  [default: off]")
@click.pass_context
def command(ctx: click.Context, dense: Path, sparse: Path, align: str, require_gate: bool, as_json: bool) -> None:
    """Compare the videos DENSE and SPARSE: two files, or two folders of equally named ones.

    \b
    Examples:
      sparsetune metrics dense.mp4 sparse.mp4
      sparsetune metrics before/ after/ --align shortest --json
    """
    from sparsetune.cli.tables import comparison_text, metric_text
    from sparsetune.cli.terminal import results_alone
    from sparsetune.errors import GateError
    from sparsetune.evaluation.videos import Align, VideoPair, compare_videos
    from sparsetune.metrics import Gate, import_metrics

    def on_pair(number: int, count: int, pair: VideoPair) -> None:
        if count > 1:
            values = ", ".join(metric_text(name, value) for name, value in pair.metrics.items())
            current_log().say("pair", f"{number}/{count} {pair.name}: {values}", name=pair.name, metrics=pair.metrics)

    config = build_config(ctx)
    import_metrics(config.eval.metric_modules)
    gate = Gate(**config.gate.model_dump())
    with results_alone():
        result = compare_videos(
            dense, sparse, names=config.eval.metrics, gate=gate, align=cast(Align, align), on_pair=on_pair
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(comparison_text(result))
    if require_gate and not result.gate.passed:
        raise GateError(f"the gate must be met, but: {'; '.join(result.gate.failures)}")
