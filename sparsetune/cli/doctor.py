"""`sparsetune doctor`: what this machine can do, and what it lacks."""

import json

import click

from sparsetune.cli.colour import outcome
from sparsetune.cli.command import Command
from sparsetune.cli.settings import build_config, cache_options, file_options, tracking_options


@click.command(cls=Command, name="doctor", short_help="Say what this machine can do, and what it lacks.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.  [default: off]")
@cache_options
@tracking_options
@file_options
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Look at Python, PyTorch, GPU, attention backends, ffmpeg, tracking store and cache, one after the other.

    Exits with 1 where something is missing without which nothing can be tuned or evaluated.

    \b
    Examples:
      sparsetune doctor
      sparsetune doctor --json
    """
    from dataclasses import asdict

    from sparsetune.doctor import examine

    findings = []
    for finding in examine(build_config(ctx)):
        findings.append(finding)
        if not as_json:
            click.echo(f"{outcome(f'{finding.status:<4}')}  {finding.name:<17}  {finding.text}")
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        click.echo(f"not ready: {', '.join(failed)}" if failed else "ready")
    if failed:
        ctx.exit(1)
