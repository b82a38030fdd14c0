"""What a command says on stderr while it works: lines for people, or a JSON object a line for programs."""

import contextlib
import io
import json
import math
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

import click

from sparsetune.cli.colour import colour_wanted
from sparsetune.cli.log_events import EVENTS, FOR_PROGRAMS, Level

LogFormat = Literal["text", "json"]

_COLOURS: Final[Mapping[Level, str]] = {"warning": "yellow", "error": "red"}


class Log(ABC):
    """Says events; a quiet one says only what went wrong.

    Args:
        quiet: say errors alone.
    """

    format: LogFormat

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, event: str, message: str, level: Level = "info", **fields: Any) -> None:
        """Say an event in one line; `fields` are those that `log_events.EVENTS` promises, all of them."""
        assert fields.keys() == EVENTS[event].keys(), f"{event} must have {sorted(EVENTS[event])}, not {sorted(fields)}"
        if not self.quiet or level == "error":
            self._write(event, message, level, fields)

    @abstractmethod
    def _write(self, event: str, message: str, level: Level, fields: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Have what libraries print to stdout go where this log goes, so that stdout holds the result alone."""


class TextLog(Log):
    """Says messages as plain lines, but for events that only programs need.

    They go to stderr as it is then: a live view puts itself in its place.
    """

    format = "text"

    def _write(self, event: str, message: str, level: Level, fields: Mapping[str, Any]) -> None:
        if event in FOR_PROGRAMS:
            return
        mark = {"error": "sparsetune: ", "output": ""}.get(event, "" if level == "info" else f"{level}: ")
        colour = colour_wanted()
        if level in _COLOURS and (sys.stderr.isatty() if colour is None else colour):
            mark = click.style(mark, fg=_COLOURS[level])
        # Not click.echo, which finds the terminal below a live view and writes into it.
        print(f"{mark}{message}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Say it line by line."""
        with _lines(self) as lines, contextlib.redirect_stdout(lines):
            yield


class JsonLog(Log):
    """Says every event as a JSON object in a line of its own.

    Args:
        quiet: say errors alone.
        stream: where to; None is stderr as it is now.
    """

    format = "json"

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(quiet)
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()

    def _write(self, event: str, message: str, level: Level, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "event": event, "message": message.strip(), **fields}
        text = json.dumps(_finite(line), ensure_ascii=False, allow_nan=False, default=str)
        with self._lock:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Make events of what libraries print to stdout and stderr."""
        with (
            _lines(self) as out,
            _lines(self) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield


def make_log(log_format: LogFormat, quiet: bool) -> Log:
    """Make the log that the options ask for."""
    return JsonLog(quiet) if log_format == "json" else TextLog(quiet)


class _Lines(io.TextIOBase):
    """A stream whose whole lines are said as events."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._rest = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Give the process's own stderr to who must have a file, e.g. to dump a crash into."""
        return 2

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._log.say("output", line.rstrip("\r"))
        return len(text)

    def finish(self) -> None:
        """Say the last line, if it wasn't ended; the stream stays usable for who has kept it."""
        if self._rest:
            self.write("\n")


@contextlib.contextmanager
def _lines(log: Log) -> "Iterator[_Lines]":
    lines = _Lines(log)
    try:
        yield lines
    finally:
        lines.finish()


def _finite(value: Any) -> Any:
    """Put null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
