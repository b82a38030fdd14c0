"""`sparsetune doctor`: what this machine can run, and what is missing."""

from typing import TYPE_CHECKING

import click

from sparsetune.cli.console import coloured_status, print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, cache_options, file_options, json_option, tracking_options

if TYPE_CHECKING:
    from sparsetune.config import Config


@click.command(cls=Command, name="doctor")
@click.option(
    "--repair",
    is_flag=True,
    help="First let a store that was moved or copied use the artifacts in its own folder.  [default: off]",
)
@json_option("the findings")
@cache_options
@tracking_options
@file_options
@click.pass_context
def command(ctx: click.Context, repair: bool, as_json: bool) -> None:
    """Check Python, PyTorch, GPU, attention backends, ffmpeg, tracking store and cache.

    Exits with 1 if something is missing without which nothing can be tuned or evaluated.

    \b
    Examples:
      sparsetune doctor
      sparsetune doctor --json
      sparsetune doctor --repair
    """
    from dataclasses import asdict

    from sparsetune.doctor import examine

    config, findings = build_config(ctx), []
    if repair:
        _repair(config)
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            click.echo(f"{coloured_status(f'{finding.status:<4}')}  {finding.name:<17}  {finding.text}")
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        click.echo(f"not ready: {', '.join(failed)}" if failed else "ready")
    if failed:
        ctx.exit(1)


def _repair(config: "Config") -> None:
    import sqlite3

    from sparsetune.errors import TrackingError
    from sparsetune.tracking.moved import use_own_artifacts
    from sparsetune.tracking.store import resolve_store
    from sparsetune.urls import sqlite_path

    database = sqlite_path(resolve_store(config.tracking).uri)
    if database is None or not database.exists():
        return
    try:
        use_own_artifacts(database)
    except sqlite3.Error as error:
        raise TrackingError(f"cannot repair {database}: {error}; end what else uses it, and repeat this") from error
