"""`sparsetune sync`: publish runs recorded while the tracking server was down."""

from dataclasses import asdict

import click

from sparsetune.cli.console import print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, json_option, store_options


@click.command(cls=Command, name="sync")
@store_options
@json_option("the outcome")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Publish the runs of the local store that their tracking server lacks, or lacks a part of.

    Runs go to the server that MLFLOW_TRACKING_URI or --tracking-uri names, if they were recorded for it; others are
    listed. The command may be interrupted and repeated: no run is published twice. It also ends the runs that killed
    processes left open, and removes their temporary folders.

    \b
    Examples:
      sparsetune sync
      sparsetune sync --tracking-uri http://mlflow.example.org:5000 --json
    """
    from sparsetune.errors import TrackingError
    from sparsetune.files import remove_left_scratch
    from sparsetune.tracking.publish import sync

    remove_left_scratch()
    done = sync(build_config(ctx).tracking)
    if as_json:
        print_json([asdict(result) for result in done])
    else:
        for result in done:
            left = f", {result.left} left ({result.reason})" if result.left else ""
            click.echo(f"{result.server}: {result.sent} runs published{left}")
        if not done:
            click.echo("all runs are published")
    failed = [result for result in done if result.left]
    if failed:
        raise TrackingError(
            f"{sum(result.left for result in failed)} runs could not be published: {failed[0].reason}; then run "
            "`sparsetune sync` again"
        )
