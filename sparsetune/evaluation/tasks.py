"""The task that an evaluation hands out: one prompt rendered, measured, shown."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.attention.policy import Policy
from sparsetune.errors import GenerationError, OutOfMemoryError
from sparsetune.evaluation.aggregate import prompt_row
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.ladder import climb
from sparsetune.evaluation.outputs import Moment, OutputFolder
from sparsetune.evaluation.prompt import Pair, PromptResult, Watch, judge
from sparsetune.evaluation.result import PromptRow, Rung
from sparsetune.executor import Emit, ModelSession
from sparsetune.metrics import get, psnr_per_frame
from sparsetune.models.prompts import AnyPrompt

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.models.generation import Renderer


from sparsetune.evaluation.prompt import evaluate_prompt
from sparsetune.executor import Phase, Side, StepDone


@dataclass(frozen=True)
class ScorePrompt:
    """Renders a prompt under a policy and measures it.

    Args:
        prompt: what is rendered.
        policy: what is at work.
        backend: the kernel of sparse calls, as the configuration names it.
        seed: of both renderings, where the prompt has none of its own.
        cache: of dense videos.
        metrics: names of registered metrics.
    """

    prompt: AnyPrompt
    policy: Policy
    backend: str
    seed: int
    cache: BaselineCache
    metrics: tuple[str, ...]

    def run(self, session: ModelSession, emit: Emit) -> PromptResult:
        """Render and measure; every step is told as `StepDone`.

        Raises:
            GenerationError: out of memory, or the frames are NaN or black.
            MetricError: a metric is unknown or gave no finite number.
        """
        handle = session.install(self.policy, self.backend)
        result = evaluate_prompt(
            session.renderer, handle, self.prompt, self.seed, self.cache, self.metrics, watching(emit, "trials")
        )
        if result.error is not None:
            raise GenerationError(result.error)
        return result


def watching(emit: Emit, phase: Phase) -> Watch:
    """Tell every denoising step as `StepDone`."""

    def watch(side: Side, step: int, num_steps: int, cached: bool) -> None:
        emit(StepDone(phase, side, step, num_steps, cached=cached))

    return watch


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgedPrompt:
    """All that is kept of a prompt: its videos are let go, but for one frame.

    Args:
        row: its row of the JSON.
        result: its metrics and counters.
        moment: its worst frame; None where it failed or nothing is written.
        videos: files written, by kind; or their contents, where the worker's files are elsewhere.
        seconds: what was spent rendering now, the ladder included and a cached dense video not.
    """

    row: PromptRow
    result: PromptResult
    moment: Moment | None = None
    videos: Mapping[str, Path | bytes] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class JudgePrompt:
    """Judges a prompt of an evaluation; see `evaluate` for what isn't said here.

    Args:
        index: the prompt's, from 0.
        prompt: what is rendered.
        backend: the kernel of sparse calls, as the configuration names it.
        outputs: where videos go; None writes nothing.
    """

    index: int
    prompt: AnyPrompt
    policy: Policy
    backend: str
    break_even: Path | None
    seed: int
    cache: BaselineCache
    metrics: tuple[str, ...]
    outputs: OutputFolder | None
    save_videos: bool
    difference: bool
    ladder: bool

    def run(self, session: ModelSession, emit: Emit) -> JudgedPrompt:
        """Render and judge the prompt and write its videos; every step is told as `StepDone`.

        Raises:
            GenerationError: out of memory.
            MetricError, CacheError, VideoError, SparsetuneError: as `evaluate` raises them.
        """
        for name in self.metrics:  # a worker that doesn't know a user's own metric says so before it renders
            get(name)
        handle, watch = session.install(self.policy, self.backend, self.break_even), watching(emit, "trials")
        result, pair = judge(session.renderer, handle, self.prompt, self.seed, self.cache, self.metrics, watch)
        if pair is None:
            return JudgedPrompt(prompt_row(self.index, result), result)
        seconds = (result.seconds_sparse or 0.0) + (0.0 if result.dense_cached else result.seconds_dense or 0.0)
        rungs: dict[Rung, dict[str, float]] | None = None
        if self.ladder:
            rungs, spent = self._climb(session.renderer, handle, result, pair, watch)
            seconds += spent
        row = prompt_row(self.index, result, rungs, psnr_per_frame(pair.dense, pair.sparse))
        moment = Moment.of(self.index, row.worst_frame or 0, pair) if self.outputs is not None else None
        videos = self._videos(pair, session.shares_files)
        return JudgedPrompt(row, result, moment, videos, seconds)

    def _climb(
        self, renderer: "Renderer", handle: "SparseHandle", result: PromptResult, pair: Pair, watch: Watch
    ) -> tuple[dict[Rung, dict[str, float]] | None, float]:
        try:
            return climb(renderer, handle, self.prompt, result.seed, pair.dense, self.metrics, watch)
        except OutOfMemoryError:
            raise
        except GenerationError as error:
            _LOG.warning("no attribution ladder for %r: %s", result.prompt, error)
            return None, 0.0

    def _videos(self, pair: Pair, shares_files: bool) -> Mapping[str, Path | bytes]:
        if self.outputs is None or not self.save_videos:
            return {}
        if shares_files:
            return self.outputs.write_videos(self.index, pair, difference=self.difference)
        with tempfile.TemporaryDirectory() as folder:
            elsewhere = replace(self.outputs, folder=Path(folder))
            written = elsewhere.write_videos(self.index, pair, difference=self.difference)
            return {kind: path.read_bytes() for kind, path in written.items()}
