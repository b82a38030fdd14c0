"""Events of a tuning, its listeners, and the clock that adds up the time of each phase from them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparsetune.attention.policy import Policy
from sparsetune.bench.step_time import StepSeconds
from sparsetune.config.models import Goal
from sparsetune.evaluation.compare import Comparison
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.evaluation.hand_set import Pair
from sparsetune.evaluation.prompt import PromptResult, speedup
from sparsetune.evaluation.result import EvaluationResult, html_table, is_faster, short_repr
from sparsetune.executor import PHASES, Incident, Phase, StepDone, Worker

Parameter = float | int | str | bool
TrialState = Literal["complete", "pruned", "failed"]


class StudyState:
    """State of a study for listeners; this base class is of one that no other process shares."""

    def num_done(self) -> int:
        """Return the number of trials that have an outcome."""
        return 0

    def earlier(self) -> "tuple[TrialResult, ...]":
        """Return the trials that have an outcome, in order; their policies are not read."""
        return ()

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
    """A search begins or is resumed.

    Args:
        study_name: its name in the storage.
        storage: the storage's URL, without credentials; `config` has none either.
        config: the whole configuration as JSON values.
        n_trials: trials it will have in the end.
        num_done: trials of earlier runs.
        prompts: tune prompts, in order.
        num_steps: denoising steps of one rendering.
        output_dir: folder of the results.
        num_eval_prompts: number of eval prompts.
        num_validation_prompts: number of validation prompts.
        goal: what is maximised; the objective `auto` is resolved.
        study: the study, which other processes may share.
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
    num_validation_prompts: int = 0
    goal: Goal = "sparsity"
    study: StudyState = field(default_factory=StudyState, compare=False)


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins.

    Several may run at once. `worker` is the name of its worker, None for this process. A trial whose worker is lost
    begins again with another one.
    """

    number: int
    params: Mapping[str, Parameter]
    policy: Policy
    worker: str | None = None


@dataclass(frozen=True)
class TrialPrompt:
    """Prompt `index` of `num_prompts` of a trial was rendered and measured."""

    number: int
    index: int
    num_prompts: int
    result: PromptResult
    worker: Worker | None = None


@dataclass(frozen=True)
class Validation:
    """A trial's figures on the validation prompts.

    Args:
        number: the trial's.
        num_prompts: number of validation prompts.
        psnr: mean in dB; None where a rendering failed.
        psnr_worst: of the worst prompt, in dB; None as `psnr`.
        feasible: whether it meets the search's gate on them.
        shortfalls: by how much it misses each bound of that gate, at most 0 if met; empty where a rendering failed.
    """

    number: int
    num_prompts: int
    psnr: float | None
    psnr_worst: float | None
    feasible: bool
    shortfalls: Mapping[str, float] = field(default_factory=dict)


class Prediction(NamedTuple):
    """What is known of a policy before it is rendered; None where its thresholds weren't calibrated."""

    error: float | None = None  # calibrated, in the unit of a budget
    seconds: float | None = None  # of the denoising; None too where the kernel computes every pair


@dataclass(frozen=True)
class TrialResult:
    """A trial that ended.

    Args:
        number: its number in the study, from 0.
        params: its parameters by name.
        state: `complete` (all tune prompts), `pruned` (stopped after some) or `failed`.
        reason: why it was pruned or failed; None when complete.
        policy: the policy that it ran.
        prompts: results of the prompts that it rendered; empty for a trial of an earlier run of the study.
        sparsity: mean over the prompts rendered; None where there is none.
        psnr: mean in dB.
        psnr_worst: of the worst prompt, in dB.
        frame_cosine: mean.
        feasible: whether it is complete and meets the gate on the tune prompts.
        seconds: wall-clock time.
        shortfalls: by how much it misses each bound of that gate, at most 0 if met; empty when it failed.
        seconds_sparse: mean of its renderings, or of their denoising alone where `seconds_dense` is known; None where
            there is none.
        seconds_dense: mean of a dense denoising, by dense steps timed before each rendering; None where the kernel
            computes every pair.
        seconds_noise: relative standard error of its prompts' mean speed-up; None below two prompts.
        predicted_error, predicted_seconds: see `Prediction`.
        blocks_run: fraction of the blocks' forwards that ran, mean; below 1 where a cache skipped some.
        worker: worker of its last prompt; None for a trial of an earlier run.
        videos: side-by-side videos to record, mp4, by index of the prompt; see `tracking.trial_videos`.
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
    seconds_dense: float | None = None
    seconds_noise: float | None = None
    predicted_error: float | None = None
    predicted_seconds: float | None = None
    blocks_run: float | None = None
    worker: Worker | None = None
    videos: Mapping[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        figures = {"number": self.number, "state": self.reason or self.state, "feasible": self.feasible}
        measured = {name: getattr(self, name) for name in ("speedup", "sparsity", "psnr", "psnr_worst", "frame_cosine")}
        shown = {name: f"{value:.4g}" for name, value in measured.items() if value is not None}
        return short_repr(self, figures | shown | {"params": dict(self.params)})

    @property
    def worst_prompt(self) -> int | None:
        """Index of the prompt with the lowest PSNR of those rendered."""
        return min(
            (index for index, prompt in enumerate(self.prompts) if "psnr" in prompt.metrics),
            key=lambda index: self.prompts[index].metrics["psnr"],
            default=None,
        )

    @property
    def saves(self) -> bool:
        """Whether it left out anything: block pairs, or whole blocks."""
        return bool(self.sparsity) or (self.blocks_run or 1.0) < 1.0

    @property
    def speedup(self) -> float | None:
        """Dense over sparse seconds of denoising; None where it wasn't measured."""
        return speedup(self.seconds_dense, self.seconds_sparse)

    @property
    def is_faster(self) -> bool:
        """Whether it is faster than dense by more than the noise, or no speed-up was measured."""
        return self.speedup is None or is_faster(self.speedup, self.seconds_noise)

    @property
    def cost(self) -> float:
        """Seconds of denoising as a share of dense, timed beside; of a rendering where that wasn't timed."""
        return (self.seconds_sparse or 0.0) / (self.seconds_dense or 1.0)


@dataclass(frozen=True)
class PerHeadGain:
    """What thresholds for each head would save beyond the winner's one for all, at the same calibrated error.

    Args:
        sparsity, per_head_sparsity: of a whole generation, both as calibration predicts them.
        seconds, per_head_seconds: of the denoising; None where sparsity saves none.
    """

    sparsity: float
    per_head_sparsity: float
    seconds: float | None
    per_head_seconds: float | None


@dataclass(frozen=True)
class SearchStatistics:
    """Statistics over all trials of a search; `insight` in files.

    Args:
        rank_correlation: Spearman's, between calibrated error and PSNR over the complete trials; near -1 where
            calibration predicts which policy will look better. None below four trials.
        importances: parameter importance in [0, 1] for being among the best tenth of the trials (PED-ANOVA); empty
            below four trials.
        seconds_correlation: Spearman's, between predicted and measured seconds of the denoising; None as above.
        seconds_error: mean of |predicted - measured| / measured; None where no trial has both.
    """

    rank_correlation: float | None
    importances: Mapping[str, float]
    seconds_correlation: float | None = None
    seconds_error: float | None = None


@dataclass(frozen=True)
class TuningResult:
    """Result of a tuning.

    Args:
        study_name: its name in the storage.
        trials: all trials, earlier runs' included, in order.
        best: the best trial that meets the gate on the tune prompts, and on the validation prompts if one does; None
            where none meets it on the tune prompts.
        closest: the sparse trial that misses the gate by the least; None if there is `best`, or nothing ran sparse.
        checkpoint_path: the winner's checkpoint; None without a winner.
        evaluation: the winner's on the eval prompts; None without a winner.
        calibration_path: the calibrated curves; None where nothing was calibrated.
        seconds: wall-clock time of this run, from loaded model to evaluated winner.
        interrupted: whether Ctrl-C ended the search before its time.
        before: evaluation of SpargeAttn's default thresholds; None without a winner.
        comparison: `before` against `evaluation`, prompt by prompt; None without a winner.
        insight: statistics over the trials.
        incidents: workers that were lost or joined.
        left_to: message about the process that saves and evaluates the winner instead of this one; None otherwise.
        seconds_by_phase: `seconds` by phase, see `PhaseClock`.
        record_path: this as JSON, see `sparsetune.tuning.record`; None where it isn't written.
        step: what a denoising step costs on this GPU; None where the kernel computes every pair.
        dial: content of the checkpoint's dial.npz; None without a calibrated winner.
        dense_because: why the dense model is recommended, where no policy is faster; None otherwise.
        hand_set: pairs of thresholds for all heads alike to compare the winner with; empty without calibrated curves.
        per_head: what thresholds for each head would gain; None where the winner has them or isn't calibrated.
        validations: the trials that were rendered on the validation prompts, in order.
    """

    study_name: str
    trials: tuple[TrialResult, ...] = ()
    best: TrialResult | None = None
    closest: TrialResult | None = None
    checkpoint_path: Path | None = None
    evaluation: EvaluationResult | None = None
    calibration_path: Path | None = None
    seconds: float = 0.0
    interrupted: bool = False
    before: EvaluationResult | None = None
    comparison: Comparison | None = None
    insight: SearchStatistics | None = None
    incidents: tuple[Incident, ...] = ()
    left_to: str | None = None
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    record_path: Path | None = None
    step: StepSeconds | None = None
    dial: bytes | None = None
    dense_because: str | None = None
    hand_set: tuple[Pair, ...] = ()
    per_head: PerHeadGain | None = None
    validations: tuple[Validation, ...] = ()

    @property
    def figures(self) -> dict[str, str]:
        """Trials, winner, and the winner's figures on the eval prompts as short texts."""
        best = "none meets the gate" if self.best is None else f"trial {self.best.number}"
        own = {} if self.evaluation is None else self.evaluation.figures
        saved = {} if self.checkpoint_path is None else {"checkpoint": str(self.checkpoint_path)}
        return {"study": self.study_name, "trials": str(len(self.trials)), "winner": best, **own, **saved}

    def __repr__(self) -> str:
        return short_repr(self, self.figures)

    def _repr_html_(self) -> str:
        return html_table(self.figures)


class TuningListener:
    """Receives the events of a search; subclasses override the methods that they need.

    Calls come one at a time, possibly from another thread than the one that called `tune`. With several workers the
    events of trials interleave. An exception in a listener ends the search, so a listener that can fail on its own (a
    full disk, a lost server) must handle that.
    """

    def on_study_start(self, event: StudyStarted) -> None:
        """The first call; nothing is rendered yet."""

    def on_trial_start(self, event: TrialStarted) -> None:
        """A trial begins."""

    def on_step(self, event: StepDone) -> None:
        """A denoising step of any phase is done; SpargeAttn's own search counts as calibration."""

    def on_prompt(self, event: TrialPrompt) -> None:
        """A prompt of a trial was rendered and measured."""

    def on_trial(self, result: TrialResult) -> None:
        """A trial ended."""

    def on_wait(self, what: str) -> None:
        """No trial or task is left to start; waits for those of other processes, e.g. `3 trials`."""

    def on_incident(self, incident: Incident) -> None:
        """E.g. a worker was lost; the search continues."""

    def on_validation(self, validation: Validation) -> None:
        """One of the best trials was rendered on the validation prompts."""

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """The winner is saved, and evaluated next."""

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        """Return the listeners for the winner's evaluation."""
        return ()

    def on_study_end(self, result: TuningResult) -> None:
        """The last call of a search that completed."""

    def on_failure(self, error: BaseException) -> None:
        """The last call of a search that ended by an error or Ctrl-C, which is raised again after this."""


def notify(listeners: Sequence[TuningListener], call: Callable[[TuningListener], None]) -> None:
    """Make one call on every listener, in order."""
    for listener in listeners:
        call(listener)


class PhaseClock(TuningListener):
    """Sums the seconds of each phase; `now` is a clock in seconds.

    A step's event comes at its end, so the time before it belongs to its phase. `preparation` is all before the first
    rendering, including SpargeAttn's own search; `trials` includes the sampler and saving the winner. A phase that is
    skipped has no seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._phase: Phase = "preparation"
        self._seconds: dict[Phase, float] = {}

    def restart(self, at: float) -> None:
        """Reset, and count from a time on."""
        self._last, self._phase, self._seconds = at, "preparation", {}

    def stop(self) -> Mapping[str, float]:
        """End the current phase and return the seconds of each phase, in order."""
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
        """A step is done."""
        self._close(event.phase)

    def on_prompt(self, event: TrialPrompt) -> None:
        """A prompt of a trial was measured."""
        self._close("trials")

    def on_trial(self, result: TrialResult) -> None:
        """A trial ended."""
        self._close("trials")

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """The winner is saved; its evaluation begins."""
        self._close(self._phase)
        self._phase = "evaluation"

    def _close(self, phase: Phase) -> None:
        now = self._now()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last, self._phase = now, phase
