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
    """An evaluation starts.

    Args:
        config: the result's `config` section: model, generation, seed, policy, checkpoint.
        prompts: all prompts, in order.
        num_steps: denoising steps per rendering.
        renderings: what is rendered per prompt, in order; a dense one may come from the cache instead.
        metrics: names of the metrics that will be computed.
        output_dir: where files go; None when none are written.
    """

    config: Mapping[str, Any]
    prompts: tuple[str, ...]
    num_steps: int
    renderings: "tuple[Side, ...]"
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
    """Prompt `index` (from 0) of `num_prompts` was evaluated, or failed (`result.error`).

    Args:
        index, num_prompts, worker: as in `PromptStarted`.
        result: its metrics, sparsity and seconds.
        videos: files written for it by kind, `dense`, `sparse` and `compare`; empty when none were.
    """

    index: int
    num_prompts: int
    result: "PromptResult"
    videos: Mapping[str, Path] = field(default_factory=dict)
    worker: "Worker | None" = None


@dataclass(frozen=True)
class EvaluationEnded:
    """An evaluation is done and its files are written.

    Args:
        result: the whole result.
        prompts: the prompts' results, with the counters of each one.
        result_path: the result's JSON; None without an output folder, as `report_path`.
        report_path: report.md.
        artifacts: all other files written (videos, stills), in order.
    """

    result: "EvaluationResult"
    prompts: "tuple[PromptResult, ...]"
    result_path: Path | None = None
    report_path: Path | None = None
    artifacts: tuple[Path, ...] = ()


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
