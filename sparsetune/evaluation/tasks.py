"""Executor tasks that render and measure one prompt."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.attention.backends import choose_backend
from sparsetune.attention.policy import Policy
from sparsetune.bench.step import capture_step
from sparsetune.bench.step_time import StepTimes, time_step
from sparsetune.errors import GenerationError, OutOfMemoryError, VideoError
from sparsetune.evaluation.aggregate import prompt_row
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.ladder import render_ladder
from sparsetune.evaluation.outputs import OutputFolder
from sparsetune.evaluation.prompt import Pair, PromptResult, StepCallback, evaluate_prompt
from sparsetune.evaluation.result import PromptRow, Rung
from sparsetune.evaluation.yardsticks import Yardsticks
from sparsetune.executor import Emit, ModelSession, Phase, Side, StepDone
from sparsetune.files import scratch_folder
from sparsetune.metrics import get, psnr_per_frame
from sparsetune.models.prompts import AnyPrompt
from sparsetune.video import SMALL, side_by_side, write_video

if TYPE_CHECKING:
    from sparsetune.attention.handle import SparseHandle
    from sparsetune.models.generation import Renderer

_LOG = logging.getLogger(__name__)


def _step_callback(emit: Emit, phase: Phase) -> StepCallback:
    def on_step(side: Side, step: int, num_steps: int, cached: bool) -> None:
        emit(StepDone(phase, side, step, num_steps, cached=cached))

    return on_step


@dataclass(frozen=True)
class ScorePrompt:
    """Renders a prompt under a policy and computes its metrics.

    `seed` is for prompts that have none of their own. With `with_video` the result has its side-by-side video.
    """

    prompt: AnyPrompt
    policy: Policy
    backend: str
    seed: int
    cache: BaselineCache
    metrics: tuple[str, ...]
    with_video: bool = False

    def run(self, session: ModelSession, emit: Emit) -> PromptResult:
        """Raise GenerationError where out of memory, or where the frames are NaN or black."""
        handle, on_step = session.install(self.policy, self.backend), _step_callback(emit, "trials")
        renderer = session.renderer
        result, pair = evaluate_prompt(renderer, handle, self.prompt, self.seed, self.cache, self.metrics, on_step)
        if pair is None:
            raise GenerationError(result.error or "the prompt failed")
        if not self.with_video:
            return result
        fps = renderer.settings.fps
        if session.shares_files:
            return replace(result, video=session.background.submit(_encoded, pair, fps))
        return replace(result, video=_encoded(pair, fps))  # a future can't be sent to another process


def _encoded(pair: Pair, fps: int) -> bytes | None:
    """Encode a side-by-side video as small mp4; None with a warning where that fails, which must not end a search."""
    try:
        with scratch_folder() as folder:
            path = folder / "compare.mp4"
            write_video(path, side_by_side(pair.dense, pair.sparse), fps, SMALL)
            return path.read_bytes()
    except (VideoError, OSError) as error:
        _LOG.warning("a trial has no video: %s", error)
        return None


@dataclass(frozen=True)
class TimeStep:
    """Times a denoising step dense and without self-attention, and sparse with the fractions `topk` of the key blocks.

    With such fractions, also once with token orders.
    """

    prompt: AnyPrompt
    seed: int
    backend: str
    topk: tuple[float, ...] = ()
    repeats: int = 3

    def run(self, session: ModelSession, emit: Emit) -> StepTimes:
        renderer = session.restore()
        step, device = capture_step(renderer, self.prompt, self.seed), renderer.loaded.device
        backend = choose_backend(self.backend, device)
        return time_step(step, backend, device, topk=self.topk, ordered=bool(self.topk), repeats=self.repeats)


@dataclass(frozen=True)
class JudgedPrompt:
    """An evaluated prompt; of its videos only the worst frame is kept, if anything is written.

    `videos` are the files written, by kind; or their contents, where the worker's files are on another machine.
    """

    row: PromptRow
    result: PromptResult
    worst_frame: Pair | None = None
    videos: Mapping[str, Path | bytes] = field(default_factory=dict)
    seconds: float = 0.0  # spent rendering now, the ladder included and a cached dense video not


@dataclass(frozen=True)
class JudgePrompt:
    """Evaluates prompt `index` (from 0); the other fields are `evaluate`'s arguments."""

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
    yardsticks: tuple[str, ...] = ()

    def run(self, session: ModelSession, emit: Emit) -> JudgedPrompt:
        for name in self.metrics:  # a worker that lacks a user's metric fails before it renders
            get(name)
        handle = session.install(self.policy, self.backend, self.break_even)
        renderer, on_step = session.renderer, _step_callback(emit, "evaluation")
        result, pair = evaluate_prompt(renderer, handle, self.prompt, self.seed, self.cache, self.metrics, on_step)
        if pair is None:
            return JudgedPrompt(prompt_row(self.index, result), result)
        seconds = (result.seconds_sparse or 0.0) + (0.0 if result.dense_cached else result.seconds_dense or 0.0)
        rungs, spent = self._ladder(renderer, handle, result, pair, on_step) if self.ladder else (None, 0.0)
        yardsticks = Yardsticks(renderer, handle, self.cache, self.metrics, on_step)
        changed, missing = yardsticks.measure(self.yardsticks, self.prompt, result.seed, pair)
        row = prompt_row(self.index, result, rungs, psnr_per_frame(pair.dense, pair.sparse), changed, missing)
        frame = row.worst_frame or 0
        worst = slice(frame, frame + 1)  # copied, so that the videos can be freed
        kept = Pair(pair.dense[worst].copy(), pair.sparse[worst].copy()) if self.outputs is not None else None
        return JudgedPrompt(row, result, kept, self._videos(pair, session.shares_files), seconds + spent)

    def _ladder(
        self, renderer: "Renderer", handle: "SparseHandle", result: PromptResult, pair: Pair, on_step: StepCallback
    ) -> tuple[dict[Rung, dict[str, float]] | None, float]:
        try:
            return render_ladder(renderer, handle, self.prompt, result.seed, pair.dense, self.metrics, on_step)
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
        with scratch_folder() as folder:
            outputs = replace(self.outputs, folder=folder)
            written = outputs.write_videos(self.index, pair, difference=self.difference)
            return {kind: path.read_bytes() for kind, path in written.items()}
