"""What an evaluation in progress has come to."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from sparsetune.cli.live.phase import Phase
from sparsetune.evaluation.events import EvaluationStarted, PromptDone, PromptStarted
from sparsetune.executor import Side, StepDone

SIDES = {"dense": "dense", "sparse": "sparse", "dense_again": "dense again", "kernel": "kernel at sparsity 0"}


@dataclass(frozen=True)
class EvaluationState:
    """An evaluation as far as it has come; every event gives the next state.

    Args:
        policy: `tuned`, or `default` for SpargeAttn's default thresholds.
        phase: its work, in denoising steps.
        num_prompts: prompts to judge.
        num_steps: of one rendering.
        cached: sides that were taken to be cached when the work was counted.
        prompt: the one in hand; None before the first.
        side: what is being rendered; None between renderings.
        step: of it, from 1.
        judged: prompts that are done, in order.
    """

    policy: str
    phase: Phase
    num_prompts: int
    num_steps: int
    cached: frozenset[Side] = frozenset()
    prompt: PromptStarted | None = None
    side: Side | None = None
    step: int = 0
    judged: tuple[PromptDone, ...] = ()

    @classmethod
    def begun(cls, event: EvaluationStarted, now: float, cached: Iterable[Side] = ()) -> Self:
        """Begin; `cached` sides are expected to cost nothing."""
        expected = frozenset(cached)
        rendered = [side for side in event.renderings if side not in expected]
        total = len(event.prompts) * len(rendered) * event.num_steps
        policy = "tuned" if event.config.get("use_tuned") else "default"
        phase = Phase("judge").begin(now, float(total))
        return cls(policy, phase, len(event.prompts), event.num_steps, expected)

    def prompt_started(self, event: PromptStarted) -> Self:
        """Take up a prompt."""
        return replace(self, prompt=event, side=None, step=0)

    def stepped(self, event: StepDone) -> Self:
        """Count a step; a rendering that turns out to be cached, or not to be, changes the whole."""
        phase, total = self.phase, self.phase.total or 0.0
        if event.cached:
            saved = 0 if event.side in self.cached else event.num_steps
            return replace(self, phase=replace(phase, total=total - saved), side=None, step=0)
        added = event.num_steps if event.side in self.cached and event.step == 1 else 0
        counted = replace(phase, total=total + added, done=phase.done + 1)
        return replace(self, phase=counted, side=event.side, step=event.step)

    def prompt_done(self, event: PromptDone) -> Self:
        """Keep a prompt's result; the steps that a failed one didn't run are taken out."""
        kept = replace(self, judged=(*self.judged, event), side=None, step=0)
        if event.result.error is None:
            return kept
        # What failed may have been any of its renderings: count what the other prompts have left.
        share = (self.phase.total or 0.0) / max(1, self.num_prompts)
        return replace(kept, phase=replace(self.phase, done=max(self.phase.done, share * len(kept.judged))))

    @property
    def measured(self) -> tuple[PromptDone, ...]:
        """The prompts that have metrics."""
        return tuple(one for one in self.judged if one.result.error is None)

    def mean(self, metric: str) -> float | None:
        """Average a metric over the prompts so far; None where there is none."""
        values = [one.result.metrics[metric] for one in self.measured if metric in one.result.metrics]
        return sum(values) / len(values) if values else None

    @property
    def sparsity(self) -> float | None:
        """The mean over the prompts so far, in [0, 1]; None where there is none."""
        values = [one.result.sparsity for one in self.measured if one.result.sparsity is not None]
        return sum(values) / len(values) if values else None

    @property
    def worst(self) -> PromptDone | None:
        """The prompt with the lowest psnr so far."""
        return min(self.measured, key=lambda one: one.result.metrics.get("psnr", 0.0), default=None)
