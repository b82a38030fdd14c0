"""Events of a tuning, its listeners, and the clock that adds up the time of each phase from them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsetune.attention.policy import Policy
from sparsetune.evaluation.compare import Comparison
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.evaluation.prompt import PromptResult
from sparsetune.evaluation.result import EvaluationResult
from sparsetune.executor import PHASES, Incident, Phase, StepDone, Worker

Parameter = float | int | str | bool
TrialState = Literal["complete", "pruned", "failed"]


class StudyState:
    """What listeners may ask of a study; this one is not shared with other processes."""

    def num_done(self) -> int:
        """Return the number of trials that have an outcome."""
        return 0

    def num_running_elsewhere(self) -> int:
        """Return the number of trials that other processes run."""
        return 0

    def update_attr(self, key: str, change: Callable[[str | None], str]) -> str:
        """Change a user attribute of the study atomically; returns its new value.

        Args:
            key: its name.
            change: called with its value, None where it has none; returns the new one.
        """
        return change(None)


@dataclass(frozen=True)
class StudyStarted:
    """A search begins, or goes on.

    Args:
        study_name: its name in the storage.
        storage: the storage's URL.
        config: the whole configuration as JSON values.
        n_trials: trials it will have in the end.
        num_done: trials that earlier runs did.
        prompts: tune prompts, in order.
        num_steps: denoising steps of one rendering.
        output_dir: where the winner goes.
        num_eval_prompts: prompts that will judge the winner.
        study: the study itself, which other processes may share.
    """

    study_name: str
    storage: str
    config: Mapping[str, Any]
    n_trials: int
    num_done: int
    prompts: tuple[str, ...]
    num_steps: int
    output_dir: Path
    num_eval_prompts: int = 0
    study: StudyState = field(default_factory=StudyState, compare=False)


@dataclass(frozen=True)
class TrialStarted:
    """Trial `number` begins with these parameters.

    Several may be in hand at once, each with events of its own; `worker` names who runs it, None where that is this
    process. It begins once more, with another worker, where the one that ran it was lost.
    """

    number: int
    params: Mapping[str, Parameter]
    policy: Policy
    worker: str | None = None


@dataclass(frozen=True)
class TrialPrompt:
    """Prompt `index` of `num_prompts` of a trial was judged."""

    number: int
    index: int
    num_prompts: int
    result: PromptResult
    worker: Worker | None = None


@dataclass(frozen=True)
class TrialResult:
    """A trial that ended.

    Args:
        number: from 0, in the order in which the study asked.
        params: its parameters by name.
        state: `complete` (all tune prompts), `pruned` (given up after some) or `failed`.
        reason: why it was pruned or failed; None when complete.
        policy: what it ran.
        prompts: results of the prompts that it rendered; empty for a trial of an earlier run of the study.
        sparsity: mean over the prompts rendered; None where there is none.
        psnr: mean in dB.
        psnr_worst: of the worst prompt, in dB.
        frame_cosine: mean.
        feasible: whether it is complete and meets the gate on the tune prompts.
        seconds: wall-clock time.
        shortfalls: by how much it misses each bound of that gate, at most 0 where one is met; empty when it failed.
        seconds_sparse: mean of its renderings; None where there is none.
        predicted_error: what calibration says of its policy's error; None where it wasn't calibrated.
        worker: who rendered its last prompt; None for a trial of an earlier run.
    """

    number: int
    params: Mapping[str, Parameter]
    state: TrialState
    reason: str | None
    policy: Policy
    prompts: tuple[PromptResult, ...]
    sparsity: float | None
    psnr: float | None
    psnr_worst: float | None
    frame_cosine: float | None
    feasible: bool
    seconds: float
    shortfalls: Mapping[str, float] = field(default_factory=dict)
    seconds_sparse: float | None = None
    predicted_error: float | None = None
    worker: Worker | None = None


@dataclass(frozen=True)
class SearchStatistics:
    """What the trials of a search say of it.

    Args:
        rank_correlation: Spearman's, between the calibrated error of a policy and the PSNR of its videos, over the
            complete trials; near -1 where calibration tells which policy will look better. None below four trials.
        importances: share in [0, 1] of each parameter in what sets the best tenth of the trials apart (PED-ANOVA);
            empty where there are too few trials to say.
    """

    rank_correlation: float | None
    importances: Mapping[str, float]


@dataclass(frozen=True)
class TuningResult:
    """What a search came to.

    Args:
        study_name: its name in the storage.
        trials: all trials, earlier runs' included, in order.
        best: the best trial that meets the gate on the tune prompts; None where none does.
        closest: the sparse trial that misses the gate by the least; None where `best` is there, or nothing ran sparse.
        checkpoint_path: the winner's checkpoint; None without a winner.
        evaluation: the winner judged on the eval prompts; None without a winner.
        calibration_path: the calibrated curves; None where nothing was calibrated.
        seconds: wall-clock time of this run, from loaded model to judged winner.
        interrupted: whether Ctrl-C ended the search before its time.
        before: SpargeAttn's default thresholds judged on the eval prompts; None without a winner.
        comparison: `before` against `evaluation`, prompt by prompt; None without a winner.
        insight: what the trials say of the search.
        incidents: what happened to workers: one lost, one joined.
        left_to: who saves and judges the winner where this process doesn't, as a sentence; None where it does.
        seconds_by_phase: `seconds` by phase, see `PhaseClock`.
        record_path: all of this as JSON, see `sparsetune.tuning.record`; None where it isn't written.
    """

    study_name: str
    trials: tuple[TrialResult, ...]
    best: TrialResult | None
    closest: TrialResult | None
    checkpoint_path: Path | None
    evaluation: EvaluationResult | None
    calibration_path: Path | None
    seconds: float
    interrupted: bool = False
    before: EvaluationResult | None = None
    comparison: Comparison | None = None
    insight: SearchStatistics | None = None
    incidents: tuple[Incident, ...] = ()
    left_to: str | None = None
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    record_path: Path | None = None


class TuningListener:
    """Watches a search; every method does nothing until a subclass says otherwise.

    Methods are called on the thread that called for the search, however many workers there are; the events of trials
    mix where there are several. What a listener raises ends the search, so one that can fail for reasons of its own (a
    full disk, a lost server) handles that itself.
    """

    def on_study_start(self, event: StudyStarted) -> None:
        """The first call: nothing was rendered yet."""

    def on_trial_start(self, event: TrialStarted) -> None:
        """A trial begins."""

    def on_step(self, event: StepDone) -> None:
        """A denoising step of any phase is done; SpargeAttn's own search counts as calibration."""

    def on_prompt(self, event: TrialPrompt) -> None:
        """A prompt of a trial is judged."""

    def on_trial(self, result: TrialResult) -> None:
        """A trial ended."""

    def on_wait(self, what: str) -> None:
        """Nothing is left to begin, and what other processes have in hand is waited for, e.g. `3 trials`."""

    def on_incident(self, incident: Incident) -> None:
        """A worker was lost, say; the search goes on."""

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """The search is over and the winner is saved; it is judged next."""

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        """Give the listeners for the winner's evaluation."""
        return ()

    def on_study_end(self, result: TuningResult) -> None:
        """The last call of a search that came to its end."""

    def on_failure(self, error: BaseException) -> None:
        """The last call of a search that did not: an error or Ctrl-C, which goes on up after this."""


def notify(listeners: Sequence[TuningListener], call: Callable[[TuningListener], None]) -> None:
    """Make one call on every listener, in order."""
    for listener in listeners:
        call(listener)


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
