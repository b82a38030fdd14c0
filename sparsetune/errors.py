"""The one tree of errors that sparsetune raises on purpose.

A message says what must hold, what was given, and what to do about it, in one line: the command line
prints it as it stands and exits with the class's `exit_code`.
"""

from typing import ClassVar


class SparsetuneError(Exception):
    """Base of every error that is a user's to mend; `exit_code` is the command line's exit status."""

    exit_code: ClassVar[int] = 1


class UsageError(SparsetuneError):
    """What was asked for can't be asked for: an option, a configuration key, a prompt file."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """A configuration key or value that doesn't hold."""


class PromptError(UsageError):
    """A prompt file or a number of prompts that can't be used."""


class ThresholdError(UsageError):
    """Thresholds or a policy outside their ranges."""


class ModelError(SparsetuneError):
    """A model that can't be found, loaded or made sparse."""


class GenerationError(SparsetuneError):
    """Rendering failed: out of memory, frames that the model can't do, NaN or black frames."""


class OutOfMemoryError(GenerationError):
    """Rendering failed for want of memory: the machine's failing, not the prompt's."""


class ExecutorError(SparsetuneError):
    """Workers that can't be had, or can't work together."""


class CheckpointError(SparsetuneError):
    """A checkpoint that can't be read or written, or belongs to another model."""


class BackendError(SparsetuneError):
    """An attention backend that is missing or can't run here."""


class MetricError(SparsetuneError):
    """A metric that is unknown or can't be computed on these frames."""


class VideoError(SparsetuneError):
    """A video file that can't be read, written or compared."""


class CacheError(SparsetuneError):
    """The dense baselines' cache can't be used."""


class ResultError(SparsetuneError):
    """A result file that can't be read, or results that can't be compared."""


class ReportError(SparsetuneError):
    """A report that can't be made: the extra is missing, or there is nothing to report."""


class TuningError(SparsetuneError):
    """A search that can't start or go on."""


class TrackingError(SparsetuneError):
    """The tracking store can't be used."""


class RegistryError(SparsetuneError):
    """A registered model's versions or aliases aren't as a promotion or rollback needs them."""


class GateError(SparsetuneError):
    """A quality gate wasn't met."""

    exit_code: ClassVar[int] = 3
