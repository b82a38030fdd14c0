"""`sparsetune doctor`: what this machine can run, and what is missing."""

import click

from sparsetune.cli.console import coloured_status, print_json
from sparsetune.cli.main import Command
from sparsetune.cli.options import build_config, cache_options, file_options, json_option, tracking_options


@click.command(cls=Command, name="doctor")
@json_option("the findings")
@cache_options
@tracking_options
@file_options
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check Python, PyTorch, GPU, attention backends, ffmpeg, tracking store and cache.

    Exits with 1 if something is missing without which nothing can be tuned or evaluated.

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
            click.echo(f"{coloured_status(f'{finding.status:<4}')}  {finding.name:<17}  {finding.text}")
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        click.echo(f"not ready: {', '.join(failed)}" if failed else "ready")
    if failed:
        ctx.exit(1)
