"""What an evaluation tells those who watch it."""

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
    """An evaluation begins.

    Args:
        config: the result's `config` section: model, generation, seed, policy, checkpoint.
        prompts: every prompt that will be judged, in order.
        num_steps: denoising steps of one rendering.
        renderings: what is rendered for each prompt, in order; a dense one may come from the cache instead.
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
    """Prompt `index` of `num_prompts` begins; `index` counts from 0.

    It begins once more, with other steps to come, where the worker that had it was lost.
    """

    index: int
    num_prompts: int
    prompt: str
    seed: int
    worker: "Worker | None" = None


@dataclass(frozen=True)
class PromptDone:
    """A prompt was judged, or failed (`result.error`).

    Args:
        index: counts from 0.
        num_prompts: how many there are.
        result: its metrics, sparsity and seconds.
        videos: files written for it by kind, `dense`, `sparse` and `compare`; empty when none were.
        worker: who judged it.
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
        result: all of it.
        prompts: the prompts' results, with the counters of each one.
        result_path: the result's JSON; None where no output folder was given, as for the rest.
        report_path: report.md.
        artifacts: every further file written (videos, stills), in order.
    """

    result: "EvaluationResult"
    prompts: "tuple[PromptResult, ...]"
    result_path: Path | None = None
    report_path: Path | None = None
    artifacts: tuple[Path, ...] = ()


class EvaluationListener:
    """Watches an evaluation; every method does nothing until a subclass says otherwise.

    Methods are called on the thread that called for the evaluation, however many workers there are; the prompts' events
    mix where there are several. What a listener raises ends the evaluation, so one that can fail for reasons of its own
    (a full disk, a lost server) handles that itself.
    """

    def on_start(self, event: EvaluationStarted) -> None:
        """The first call: nothing was rendered yet."""

    def on_prompt_start(self, event: PromptStarted) -> None:
        """A prompt begins."""

    def on_step(self, event: "StepDone") -> None:
        """A denoising step is done."""

    def on_prompt(self, event: PromptDone) -> None:
        """A prompt is judged and its videos are written."""

    def on_incident(self, incident: "Incident") -> None:
        """A worker was lost, say; the work goes on."""

    def on_end(self, event: EvaluationEnded) -> None:
        """The last call of an evaluation that came to its end."""

    def on_failure(self, error: BaseException) -> None:
        """The last call of an evaluation that did not: an error or Ctrl-C, which goes on up after this."""


class Listeners(EvaluationListener):
    """Several listeners as one, told in order."""

    def __init__(self, listeners: Sequence[EvaluationListener]) -> None:
        self._listeners = tuple(listeners)

    def on_start(self, event: EvaluationStarted) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_start(event)

    def on_prompt_start(self, event: PromptStarted) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_prompt_start(event)

    def on_step(self, event: "StepDone") -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_step(event)

    def on_prompt(self, event: PromptDone) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_prompt(event)

    def on_incident(self, incident: "Incident") -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_incident(incident)

    def on_end(self, event: EvaluationEnded) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_end(event)

    def on_failure(self, error: BaseException) -> None:
        """Tell every listener."""
        for listener in self._listeners:
            listener.on_failure(error)
