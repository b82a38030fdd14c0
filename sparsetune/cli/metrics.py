"""`sparsetune metrics`: metrics of existing videos, without a model."""

from pathlib import Path
from typing import cast

import click

from sparsetune.cli import options
from sparsetune.cli.console import current_log, only_results_on_stdout
from sparsetune.cli.main import Command
from sparsetune.files import json_text


@click.command(cls=Command, name="metrics", shows_progress=True)
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("sparse", type=click.Path(path_type=Path))
@click.option(
    "--align",
    type=click.Choice(["strict", "shortest"]),
    default="strict",
    help="strict requires equal frame counts; shortest ignores the frames that only one has.  [default: strict]",
)
@options.metric_options
@options.gate_options
@options.file_options
@options.require_gate_option
@options.json_option("the result")
@click.pass_context
def command(ctx: click.Context, dense: Path, sparse: Path, align: str, require_gate: bool, as_json: bool) -> None:
    """Compare the videos or images DENSE and SPARSE: two files, or two folders with files of the same names.

    \b
    Examples:
      sparsetune metrics dense.mp4 sparse.mp4
      sparsetune metrics before/ after/ --align shortest --json
    """
    from sparsetune.cli.tables import comparison_text, metric_text
    from sparsetune.errors import GateError
    from sparsetune.evaluation.videos import Align, VideoPair, compare_videos
    from sparsetune.metrics import Gate, import_metrics

    def on_pair(number: int, count: int, pair: VideoPair) -> None:
        if count > 1:
            values = ", ".join(metric_text(name, value) for name, value in pair.metrics.items())
            current_log().event("pair", f"{number}/{count} {pair.name}: {values}", name=pair.name, metrics=pair.metrics)

    config = options.build_config(ctx)
    import_metrics(config.eval.metric_modules)
    gate = Gate(**config.gate.model_dump())
    with only_results_on_stdout():
        result = compare_videos(
            dense, sparse, names=config.eval.metrics, gate=gate, align=cast(Align, align), on_pair=on_pair
        )
    click.echo(json_text(result.to_dict()) if as_json else comparison_text(result))
    if require_gate and not result.gate.passed:
        raise GateError(f"the gate is not met: {'; '.join(result.gate.failures)}")
