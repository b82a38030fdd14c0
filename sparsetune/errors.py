"""Exceptions of sparsetune.

A message says in one line what went wrong, with the value, and what to do: the command line prints it and exits with
the class's `exit_code`.
"""

import re

from sparsetune.urls import without_credentials

MAX_VALUE, MAX_MESSAGE = 200, 1000
"""Characters that are shown of a value, and of a whole message."""

_LONG_VALUE = re.compile(rf"(?<!\w)'[^']{{{MAX_VALUE},}}'|\"[^\"]{{{MAX_VALUE},}}\"|\S{{{MAX_VALUE},}}")


def message_line(text: str) -> str:
    """Return a message as one line without credentials; long values are cut, and a long message in its middle."""
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate can't be printed
    line = _LONG_VALUE.sub(lambda value: f"{value[0][:MAX_VALUE]}…", " ".join(text[: 10**6].split()))
    line = without_credentials(line)
    end = MAX_MESSAGE // 4
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - end]} … {line[-end:]}"


class SparsetuneError(Exception):
    """Base of all errors that a user can fix; `exit_code` is the command line's exit status.

    `is_usage` marks one error of a class as invalid usage, e.g. a name that doesn't exist.
    """

    exit_code: int = 1

    def __init__(self, message: str = "", *, is_usage: bool = False) -> None:
        super().__init__(message_line(message))
        if is_usage:
            self.exit_code = UsageError.exit_code


class UsageError(SparsetuneError):
    """Invalid usage: an option, a configuration key, a prompt file."""

    exit_code = 2


class ConfigError(UsageError):
    """An invalid configuration key or value."""


class PromptError(UsageError):
    """An invalid prompt file or number of prompts."""


class ThresholdError(UsageError):
    """Thresholds or a policy outside their ranges."""


class ModelError(SparsetuneError):
    """A model can't be found, loaded or made sparse."""


class GenerationError(SparsetuneError):
    """Rendering failed: unsupported size, out of memory, NaN or black frames."""


class OutOfMemoryError(GenerationError):
    """Rendering ran out of memory, which is the machine's limit rather than the prompt's fault."""


class ExecutorError(SparsetuneError):
    """Workers can't be started, or don't match each other."""


class CheckpointError(SparsetuneError):
    """A checkpoint can't be read or written, or belongs to another model."""


class BackendError(SparsetuneError):
    """An attention backend is unknown or can't run here."""


class MetricError(SparsetuneError):
    """A metric is unknown or can't be computed on these frames."""


class VideoError(SparsetuneError):
    """A video file can't be read, written or compared."""


class CacheError(SparsetuneError):
    """The cache of dense baselines, or a lock file, can't be used."""


class ResultError(SparsetuneError):
    """A result file can't be read, or results can't be compared."""


class ReportError(SparsetuneError):
    """A report can't be made: a package is missing, or there is nothing to report."""


class TuningError(SparsetuneError):
    """A search can't start or continue."""


class TrackingError(SparsetuneError):
    """The tracking store can't be used."""


class RegistryError(SparsetuneError):
    """A registered model's versions or aliases don't allow a promotion or rollback."""


class GateError(SparsetuneError):
    """A quality gate wasn't met."""

    exit_code = 3
