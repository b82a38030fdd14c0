"""What went wrong, as one line on stderr with an exit status."""

import sys
import traceback
from dataclasses import dataclass
from functools import cached_property

import click

from sparsetune.cli.log import JsonLog, Log, LogFormat, make_log
from sparsetune.errors import SparsetuneError

INTERRUPTED = 130


@dataclass
class Session:
    """One run of the command line.

    Args:
        debug: asks for tracebacks and for what other libraries say.
        quiet: asks for results and errors alone.
        log_format: of what is said on stderr.
    """

    debug: bool = False
    quiet: bool = False
    log_format: LogFormat = "text"

    @cached_property
    def log(self) -> Log:
        """What the command says things with; to be asked for when its options are known."""
        return make_log(self.log_format, self.quiet)


def current_log() -> Log:
    """Give the log of the command that is running."""
    ctx = click.get_current_context(silent=True)
    session = None if ctx is None else ctx.find_object(Session)
    return (session or Session()).log


def say(message: str) -> None:
    """Say something that is no result and no progress."""
    current_log().say("note", message)


def say_loading(model: str) -> None:
    """Say that a model is being loaded."""
    current_log().say("loading", f"loading {model} ...", model=model)


def exit_status(error: BaseException, session: Session) -> int:
    """Say on stderr what went wrong, in one line unless debugging, and give the exit status."""
    if isinstance(error, click.ClickException):
        if isinstance(session.log, JsonLog):
            return _said(error, error.format_message(), error.exit_code, session)
        error.show()
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _said(error, "interrupted; nothing half-written is left", INTERRUPTED, session)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of our output has gone: there is nobody to tell
        return 1
    if session.debug:
        session.log.say("output", "".join(traceback.format_exception(error)).rstrip(), "error")
    if isinstance(error, SparsetuneError):
        return _said(error, str(error), error.exit_code, session)
    advice = "" if session.debug else "; run it again as `sparsetune --debug ...` for the traceback"
    return _said(error, f"unexpected {type(error).__name__}: {error}{advice}", 1, session)


def _said(error: BaseException, message: str, status: int, session: Session) -> int:
    line = " ".join(message.split())
    session.log.say("error", line, "error", error_type=type(error).__name__, exit_code=status)
    return status
