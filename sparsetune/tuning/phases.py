"""Where the time of a tuning goes, told by its events."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sparsetune.executor import PHASES, Phase, StepDone
from sparsetune.tuning.events import (
    StudyStarted,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TuningListener,
)


class PhaseClock(TuningListener):
    """Adds up the seconds of each phase.

    An event of a step comes at the step's end, so the time before it is its phase's; the first trial begins at once,
    so the time before that is still the phase's before it. `preparation` is the study's opening and what a tuner does
    before its first rendering, SpargeAttn's own search counted in; `trials` holds the sampler's own time and the
    winner's saving. A phase that is skipped has no seconds.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._phase: Phase = "preparation"
        self._seconds: dict[Phase, float] = {}

    def restart(self, at: float) -> None:
        """Count from this time on, forgetting what was."""
        self._last, self._phase, self._seconds = at, "preparation", {}

    def stop(self) -> Mapping[str, float]:
        """Close the phase that goes on, and give the seconds of each phase that there was, in order."""
        self._close(self._phase)
        return {phase: self._seconds[phase] for phase in PHASES if phase in self._seconds}

    def on_study_start(self, event: StudyStarted) -> None:
        """The study is open."""
        self._close("preparation")

    def on_trial_start(self, event: TrialStarted) -> None:
        """A trial begins."""
        self._close(self._phase)
        self._phase = "trials"

    def on_step(self, event: StepDone) -> None:
        """A step was done."""
        self._close(event.phase)

    def on_prompt(self, event: TrialPrompt) -> None:
        """A prompt of a trial was judged."""
        self._close("trials")

    def on_trial(self, result: TrialResult) -> None:
        """A trial ended."""
        self._close("trials")

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """The winner is saved, and judged next."""
        self._close(self._phase)
        self._phase = "evaluation"

    def _close(self, phase: Phase) -> None:
        now = self._now()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last, self._phase = now, phase
