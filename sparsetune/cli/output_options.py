"""The options that say how a command tells of its work; the program takes them before a command's name and after it."""

from typing import Any, get_args

import click

from sparsetune.cli.log import LogFormat


def quiet_option(**attributes: Any) -> click.Option:
    """Make `--quiet`."""
    return click.Option(
        ["-q", "--quiet"], is_flag=True, help="Print results and errors alone.  [default: off]", **attributes
    )


def log_format_option(**attributes: Any) -> click.Option:
    """Make `--log-format`; its value is None where it isn't given."""
    return click.Option(
        ["--log-format"],
        type=click.Choice(get_args(LogFormat)),
        help="Progress on stderr as text, or as a JSON object a line.  [default: text]",
        **attributes,
    )
