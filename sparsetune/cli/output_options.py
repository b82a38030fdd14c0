"""The options that say how a command tells of its work; the program takes them before a command's name and after it."""

from typing import get_args

import click

from sparsetune.cli.failures import Session
from sparsetune.cli.log import LogFormat


def output_options(*, hidden: bool = False) -> list[click.Parameter]:
    """Make `--quiet` and `--log-format`, which set the session as soon as they are read.

    Args:
        hidden: leave them out of the help.
    """
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_quiet,
            help="Print results and errors alone.  [default: off]",
        ),
        click.Option(
            ["--log-format"],
            type=click.Choice(get_args(LogFormat)),
            hidden=hidden,
            expose_value=False,
            callback=_set_log_format,
            help="Progress on stderr as text, or as a JSON object a line.  [default: text]",
        ),
    ]


def _set_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    session = ctx.find_object(Session)
    if value and session is not None:
        session.quiet = True


def _set_log_format(ctx: click.Context, _param: click.Parameter, value: LogFormat | None) -> None:
    session = ctx.find_object(Session)
    if value is not None and session is not None:
        session.log_format = value
