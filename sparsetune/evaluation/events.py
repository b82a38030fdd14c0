"""Events of an evaluation, and the listener that receives them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetune.evaluation.prompt import PromptResult
    from sparsetune.evaluation.result import EvaluationResult
    from sparsetune.executor import Incident, Side, StepDone, Worker


@dataclass(frozen=True)
class EvaluationStarted:
    """An evaluation starts."""

    config: Mapping[str, Any]  # the result's section: model, generation, seed, policy, checkpoint
    prompts: tuple[str, ...]
    num_steps: int  # per rendering
    renderings: "tuple[Side, ...]"  # of each prompt, in order; a dense one may come from the cache instead
    metrics: tuple[str, ...]
    output_dir: Path | None = None


@dataclass(frozen=True)
class PromptStarted:
    """Prompt `index` (from 0) of `num_prompts` starts; again, where the worker that had it was lost."""

    index: int
    num_prompts: int
    prompt: str
    seed: int
    worker: "Worker | None" = None


@dataclass(frozen=True)
class PromptDone:
    """Prompt `index` (from 0) of `num_prompts` was evaluated, or failed (`result.error`)."""

    index: int
    num_prompts: int
    result: "PromptResult"
    videos: Mapping[str, Path] = field(default_factory=dict)  # written files by kind: dense, sparse, compare
    worker: "Worker | None" = None


@dataclass(frozen=True)
class EvaluationEnded:
    """An evaluation is done and its files are written; without an output folder the paths are None."""

    result: "EvaluationResult"
    prompts: "tuple[PromptResult, ...]"
    result_path: Path | None = None
    report_path: Path | None = None
    artifacts: tuple[Path, ...] = ()  # all other files written: videos, stills


class EvaluationListener:
    """Base class of listeners to an evaluation; its methods do nothing.

    Methods are called on the thread that called `evaluate`, however many workers there are; with several, the events of
    their prompts interleave. An exception from a listener ends the evaluation.
    """

    def on_start(self, event: EvaluationStarted) -> None:
        """The first call: nothing was rendered yet."""

    def on_prompt_start(self, event: PromptStarted) -> None:
        """A prompt starts."""

    def on_step(self, event: "StepDone") -> None:
        """A denoising step is done."""

    def on_prompt(self, event: PromptDone) -> None:
        """A prompt is evaluated and its videos are written."""

    def on_incident(self, incident: "Incident") -> None:
        """A worker was lost or joined; the evaluation goes on."""

    def on_end(self, event: EvaluationEnded) -> None:
        """The last call of an evaluation that succeeded."""

    def on_failure(self, error: BaseException) -> None:
        """The last call of one that failed or was interrupted; the error is raised after it."""


class Listeners(EvaluationListener):
    """Several listeners as one, called in order."""

    def __init__(self, listeners: Sequence[EvaluationListener]) -> None:
        self._listeners = tuple(listeners)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def notify(event: Any) -> None:
            for listener in self._listeners:
                getattr(listener, name)(event)

        return notify
