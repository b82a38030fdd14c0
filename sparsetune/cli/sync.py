"""`sparsetune sync`: publish runs recorded while the tracking server was down."""

import json
from dataclasses import asdict

import click

from sparsetune.cli.command import Command
from sparsetune.cli.settings import build_config, file_options, setting


@click.command(cls=Command, name="sync", short_help="Upload runs recorded while the server was down.")
@setting("tracking.uri", "--tracking-uri")
@file_options
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON, alone on stdout.  [default: off]")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Publish the runs of the local store that their tracking server lacks, or lacks a part of.

    Each run goes to the server that it was recorded for. The command may be interrupted and repeated: no run is
    published twice.

    \b
    Examples:
      sparsetune sync
      sparsetune sync --json
    """
    from sparsetune.errors import TrackingError
    from sparsetune.tracking.publish import sync

    done = sync(build_config(ctx).tracking)
    if as_json:
        click.echo(json.dumps([asdict(result) for result in done], indent=2, ensure_ascii=False))
    else:
        for result in done:
            left = f", {result.left} left ({result.reason})" if result.left else ""
            click.echo(f"{result.server}: {result.sent} runs published{left}")
        if not done:
            click.echo("all runs are published")
    failed = [result for result in done if result.left]
    if failed:
        raise TrackingError(
            f"{sum(result.left for result in failed)} runs could not be published: {failed[0].reason}; run "
            "`sparsetune sync` again"
        )
