"""The judging of an evaluation's prompts, one after the other."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetune.errors import GenerationError
from sparsetune.evaluation.aggregate import prompt_row
from sparsetune.evaluation.baseline import BaselineCache
from sparsetune.evaluation.events import EvaluationListener, PromptDone, PromptStarted, Side, StepDone
from sparsetune.evaluation.ladder import climb
from sparsetune.evaluation.outputs import Moment, OutputFolder
from sparsetune.evaluation.pair import Pair, PromptResult, Watch, judge, out_of_memory
from sparsetune.evaluation.result import PromptRow, Rung
from sparsetune.metrics import psnr_per_frame
from sparsetune.models.prompts import AnyPrompt, as_prompt

if TYPE_CHECKING:
    from sparsetune.attention.sparsify import SparseHandle
    from sparsetune.models.generation import Renderer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgedPrompt:
    """All that is kept of a prompt: its videos are let go, but for one frame.

    Args:
        row: its row of the JSON.
        result: its metrics and counters.
        moment: its worst frame; None where it failed or nothing is written.
        videos: files written, by kind.
        seconds: what was spent rendering now, the ladder included and a cached dense video not.
    """

    row: PromptRow
    result: PromptResult
    moment: Moment | None = None
    videos: Mapping[str, Path] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Session:
    """What every prompt of an evaluation is judged with; see `evaluate` for the fields."""

    renderer: "Renderer"
    handle: "SparseHandle"
    prompts: tuple[AnyPrompt, ...]
    seed: int
    cache: BaselineCache
    metrics: tuple[str, ...]
    listener: EvaluationListener
    outputs: OutputFolder | None
    save_videos: bool
    difference: bool
    ladder: bool

    @property
    def renderings(self) -> tuple[Side, ...]:
        """What is rendered for each prompt, in order."""
        return ("dense", "sparse", "dense_again", "kernel") if self.ladder else ("dense", "sparse")

    def judge(self, index: int) -> JudgedPrompt:
        """Render and judge prompt `index`, write its videos and tell the listener.

        Raises:
            GenerationError: out of memory.
            MetricError, CacheError, VideoError, SparsetuneError: as `evaluate` raises them.
        """
        prompt, total = self.prompts[index], len(self.prompts)
        given = as_prompt(prompt)
        self.listener.on_prompt_start(
            PromptStarted(index, total, given.text, self.seed if given.seed is None else given.seed)
        )
        watch = self._watch(index)
        result, pair = judge(self.renderer, self.handle, prompt, self.seed, self.cache, self.metrics, watch)
        if pair is None:
            judged = JudgedPrompt(prompt_row(index, result), result)
        else:
            judged = self._with_files(index, result, pair, watch)
        self.listener.on_prompt(PromptDone(index, total, result, judged.videos))
        return judged

    def _with_files(self, index: int, result: PromptResult, pair: Pair, watch: Watch) -> JudgedPrompt:
        seconds = (result.seconds_sparse or 0.0) + (0.0 if result.dense_cached else result.seconds_dense or 0.0)
        rungs: dict[Rung, dict[str, float]] | None = None
        if self.ladder:
            rungs, spent = self._climb(self.prompts[index], result, pair, watch)
            seconds += spent
        frames = psnr_per_frame(pair.dense, pair.sparse)
        row = prompt_row(index, result, rungs, frames)
        videos: Mapping[str, Path] = {}
        if self.outputs is not None and self.save_videos:
            videos = self.outputs.write_videos(index, pair, difference=self.difference)
        moment = Moment.of(index, row.worst_frame or 0, pair) if self.outputs is not None else None
        return JudgedPrompt(row, result, moment, videos, seconds)

    def _climb(
        self, prompt: AnyPrompt, result: PromptResult, pair: Pair, watch: Watch
    ) -> tuple[dict[Rung, dict[str, float]] | None, float]:
        try:
            return climb(self.renderer, self.handle, prompt, result.seed, pair.dense, self.metrics, watch)
        except GenerationError as error:
            if out_of_memory(error):
                raise
            _LOG.warning("no attribution ladder for %r: %s", result.prompt, error)
            return None, 0.0

    def _watch(self, index: int) -> Watch:
        def watch(side: Side, step: int, num_steps: int, cached: bool) -> None:
            self.listener.on_step(StepDone(index, side, step, num_steps, cached))

        return watch
