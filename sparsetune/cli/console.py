"""Output of a command: results on stdout, its log on stderr as text or JSON lines, messages of libraries hidden."""

import contextlib
import functools
import io
import json
import logging
import math
import os
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Final, Literal, TextIO

import click

from sparsetune.cli.log_schema import EVENTS, JSON_ONLY, Level
from sparsetune.files import json_text
from sparsetune.urls import without_credentials

LogFormat = Literal["text", "json"]

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
"""Libraries read these on import; values that the user has set are kept."""

_LEVEL_COLOURS: Final[Mapping[Level, str]] = {"warning": "yellow", "error": "red"}
_STATUS_COLOURS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("met", "passed", "ok", "excellent", "good"), "green"),
    **dict.fromkeys(("missed", "acceptable", "note"), "yellow"),
    **dict.fromkeys(("not met", "failed", "fail", "rejected", "degraded"), "red"),
    "pruned": "bright_black",
}


def colour_wanted(environ: Mapping[str, str] | None = None) -> bool | None:
    """Whether NO_COLOR (https://no-color.org), TERM or FORCE_COLOR decide it, also for files; None: if a terminal."""
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR") or environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    return True if environ.get("FORCE_COLOR") else None


def coloured_status(word: str, text: str | None = None) -> str:
    """Return `text`, or the word itself, in the colour of a status word; `click.echo` strips it from files."""
    colour = _STATUS_COLOURS.get(word.strip().lower())
    text = word if text is None else text
    return text if colour is None else click.style(text, fg=colour)


class Log:
    """Log of a command's events: plain lines on stderr, or one JSON object a line on `stream` (stderr as it is now).

    `quiet` leaves only errors; `verbose` asks for details of each event.
    """

    def __init__(
        self, format: LogFormat = "text", quiet: bool = False, stream: TextIO | None = None, verbose: bool = False
    ) -> None:
        self.format, self.quiet, self.verbose = format, quiet, verbose
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def event(self, event: str, message: str, level: Level = "info", **fields: Any) -> None:
        """Log an event in one line; `fields` must be exactly those in `log_schema.EVENTS`."""
        assert fields.keys() == EVENTS[event].keys(), f"{event} must have {sorted(EVENTS[event])}, got {sorted(fields)}"
        if self.quiet and level != "error":
            return
        message = without_credentials(message)
        if self.format == "json":
            self._write_json({"level": level, "event": event, "message": message.strip(), **fields})
        elif event not in JSON_ONLY:
            prefix = {"error": "sparsetune: ", "output": ""}.get(event, "" if level == "info" else f"{level}: ")
            colour = colour_wanted()
            if level in _LEVEL_COLOURS and (sys.stderr.isatty() if colour is None else colour):
                prefix = click.style(prefix, fg=_LEVEL_COLOURS[level])
            # rich's live display replaces sys.stderr to print above itself; click.echo would bypass it.
            print(f"{prefix}{message}", file=sys.stderr, flush=True)

    def _write_json(self, fields: Mapping[str, Any]) -> None:
        line = _finite({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)
        with self._lock:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    @contextlib.contextmanager
    def capture_output(self) -> Iterator[None]:
        """Log what libraries print to stdout, for JSON also to stderr, so that stdout holds only the result."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(_LineStream(self))))
            if self.format == "json":
                stack.enter_context(contextlib.redirect_stderr(stack.enter_context(_LineStream(self))))
            yield


class _LineStream(io.TextIOBase):
    def __init__(self, log: Log) -> None:
        self._log = log
        self._rest = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2  # faulthandler needs a real file

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log.event("output", line.rstrip("\r"))
        return len(text)

    def close(self) -> None:
        if self._rest:
            self.write("\n")
        super().close()


def _finite(value: Any) -> Any:
    """Replace numbers that JSON doesn't have (nan, inf) by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


@dataclass
class GlobalOptions:
    """Options of the whole program, accepted before and after a command's name."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    log_format: LogFormat = "text"
    arguments: tuple[str, ...] = ()
    answer: Callable[[], str] | None = None  # to Ctrl-C: what is kept, what it does now, and for how long

    @property
    def command(self) -> str:
        """The command as it was given, to be repeated."""
        return shlex.join(("sparsetune", *self.arguments))

    def on_interrupt(self) -> bool:
        """Answer the first Ctrl-C, and return whether a second one ends the command at once."""
        if self.answer is not None:
            self.log.event("note", f"{self.answer()}; Ctrl-C again ends it at once")
        return self.answer is not None

    @cached_property
    def log(self) -> Log:
        """The command's log; to be used only after the options are parsed."""
        return Log(self.log_format, self.quiet, verbose=self.verbose)


def global_options(ctx: click.Context | None = None) -> GlobalOptions:
    ctx = ctx or click.get_current_context(silent=True)
    return (ctx.find_object(GlobalOptions) if ctx is not None else None) or GlobalOptions()


def current_log() -> Log:
    return global_options().log


def log_note(message: str) -> None:
    current_log().event("note", message)


def log_loading(model: str) -> None:
    current_log().event("loading", f"loading {model} ...", model=model)


def print_json(value: Any) -> None:
    click.echo(json_text(value))


def only_results_on_stdout() -> contextlib.AbstractContextManager[None]:
    return current_log().capture_output()


class _LogHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and record.name.partition(".")[0] != "sparsetune":
            return
        level: Level = (
            "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else "info"
        )
        self._log.event("log", record.getMessage(), level, logger=record.name)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Log only sparsetune's own warnings and records, and errors of other libraries."""
    log = current_log()
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    handler = _LogHandler(log)
    root, ours = logging.getLogger(), logging.getLogger("sparsetune")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"sparsetune(\.|$)")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # meant for developers, not for users of the command
        warnings.showwarning = functools.partial(_show_warning, log)
        try:
            yield
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)


def _show_warning(log: Log, message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
    if category.__module__.partition(".")[0] not in ("builtins", "sparsetune"):
        return  # a library's own category, attributed to our module by its stack level
    log.event("log", " ".join(str(message).split()), "warning", logger="sparsetune")
