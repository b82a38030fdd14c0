"""What reaches the terminal: our own lines on stderr, results on stdout, other libraries' chatter nowhere."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console

QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""Set, where the user set nothing else, before the libraries are imported: they read them only then."""


class _OursOnly(logging.Filter):
    """Lets sparsetune's records pass, and of others only errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] == "sparsetune" or record.levelno >= logging.ERROR


class _StderrHandler(logging.Handler):
    """Writes a record as one plain line, at stderr as it is then (a test or progress display may replace it)."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        click.echo(f"{level}{record.getMessage()}", err=True)


def stderr_console() -> Console:
    """Give a console on stderr; without colours where `NO_COLOR` is set or stderr is no terminal."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def stdout_console() -> Console:
    """Give a console on stdout, for results."""
    return Console(soft_wrap=True, highlight=False)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let only sparsetune's own warnings and log records through, as one line each on stderr."""
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    handler = _StderrHandler()
    handler.addFilter(_OursOnly())
    root, ours = logging.getLogger(), logging.getLogger("sparsetune")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"sparsetune(\.|$)")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # of a library about our call: the developer's matter
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Send to stderr what libraries print to stdout meanwhile, so that stdout holds the result and nothing else."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _show_warning(message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
    if category.__module__.partition(".")[0] not in ("builtins", "sparsetune"):
        return  # a library's own kind of warning, laid at our door by its stack level
    click.echo(f"warning: {' '.join(str(message).split())}", err=True)
