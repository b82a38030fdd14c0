"""What went wrong, as one line on stderr with an exit status."""

import sys
import traceback
from dataclasses import dataclass

import click

from sparsetune.errors import SparsetuneError

INTERRUPTED = 130


@dataclass
class Session:
    """One run of the command line; `debug` asks for tracebacks and for what other libraries say."""

    debug: bool = False


def exit_status(error: BaseException, session: Session) -> int:
    """Say on stderr what went wrong, in one line unless debugging, and give the exit status."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        click.echo("sparsetune: interrupted; nothing half-written is left", err=True)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of our output has gone: there is nobody to tell
        return 1
    if session.debug:
        traceback.print_exception(error)
    if isinstance(error, SparsetuneError):
        click.echo(f"sparsetune: {_one_line(error)}", err=True)
        return error.exit_code
    advice = "" if session.debug else "; run it again as `sparsetune --debug ...` for the traceback"
    click.echo(f"sparsetune: unexpected {type(error).__name__}: {_one_line(error)}{advice}", err=True)
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
