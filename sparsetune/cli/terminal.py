"""What reaches the terminal: our own lines on stderr, results on stdout, other libraries' chatter nowhere."""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console

from sparsetune.cli.failures import current_log
from sparsetune.cli.log import Log
from sparsetune.cli.log_events import Level

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


_LEVELS: Final[tuple[tuple[int, Level], ...]] = ((logging.ERROR, "error"), (logging.WARNING, "warning"))


class _OursOnly(logging.Filter):
    """Lets sparsetune's records pass, and of others only errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] == "sparsetune" or record.levelno >= logging.ERROR


class _LogHandler(logging.Handler):
    """Says a record as one line."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level: Level = next((name for number, name in _LEVELS if record.levelno >= number), "info")
        self._log.say("log", record.getMessage(), level, logger=record.name)


class SteadyConsole(Console):
    """A console that never hides the cursor: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is."""
        return False


def stderr_console() -> Console:
    """Give a console on stderr; without colours where `NO_COLOR` is set or stderr is no terminal."""
    return SteadyConsole(stderr=True, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def quiet_libraries(log: Log | None = None) -> Iterator[None]:
    """Let only sparsetune's own warnings and log records through, as one line each.

    Args:
        log: what says them; None is that of the command that is running.
    """
    log = log or current_log()
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    handler = _LogHandler(log)
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
        warnings.showwarning = functools.partial(_show_warning, log)
        try:
            yield
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """Say on stderr what libraries print to stdout meanwhile, so that stdout holds the result and nothing else."""
    with current_log().gathered():
        yield


def _show_warning(log: Log, message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
    if category.__module__.partition(".")[0] not in ("builtins", "sparsetune"):
        return  # a library's own kind of warning, laid at our door by its stack level
    log.say("log", " ".join(str(message).split()), "warning", logger="sparsetune")
