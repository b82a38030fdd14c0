"""A listener that shows a search's progress: trials with the best so far, sparsity, PSNR and time left."""

from pathlib import Path

from sparsetune.cli.display import EvaluationDisplay
from sparsetune.cli.progress import ProgressBar, clock
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.tuning.events import (
    CalibrationStep,
    ProbeStep,
    StudyStarted,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TrialStep,
    TuningListener,
    TuningResult,
)


class TuningDisplay(TuningListener):
    """Shows calibration, trials and the winner's evaluation, one bar after the other, and a line for each trial."""

    def __init__(self, bar: ProgressBar | None = None) -> None:
        self._bar = bar or ProgressBar()
        self._study: StudyStarted | None = None
        self._best: TrialResult | None = None
        self._trial_steps = 0
        self._phase = ""

    def on_study_start(self, event: StudyStarted) -> None:
        """Say what is searched, and where it can be taken up again."""
        self._study = event
        done = f", {event.num_done} of them done earlier" if event.num_done else ""
        prompts = "1 prompt" if len(event.prompts) == 1 else f"{len(event.prompts)} prompts"
        self._bar.line(f"study {event.study_name}: {event.n_trials} trials{done}, on {prompts}")

    def on_calibration_step(self, event: CalibrationStep) -> None:
        """Count a step of the calibration."""
        self._enter("calibrating", event.num_prompts * event.num_steps)
        if event.step == 1:
            self._bar.line(f"calibrating on tune prompt {event.index + 1}/{event.num_prompts}")
        self._bar.advance(1, f"calibrating, prompt {event.index + 1}/{event.num_prompts}")

    def on_probe_step(self, event: ProbeStep) -> None:
        """Count a step of a sensitivity probe."""
        self._enter("probing", event.num_renderings * event.num_steps)
        if event.index == 0 and event.step == 1:
            self._bar.line(f"probing which parts of the generation bear sparsity: {event.num_renderings} renderings")
        self._bar.advance(1, f"probing, rendering {event.index + 1}/{event.num_renderings}")

    def on_trial_start(self, event: TrialStarted) -> None:
        """Begin the bar with the first trial: its steps are those of all trials that are left."""
        if self._study is not None:
            left = max(1, self._study.n_trials - self._study.num_done)
            self._enter("trials", left * self._steps_of_a_trial)
        self._trial_steps = 0
        self._bar.advance(0, self._where(event.number))

    def on_step(self, event: TrialStep) -> None:
        """Count a step."""
        self._trial_steps += 1
        self._bar.advance(1, f"{self._where(event.number)}, prompt {event.index + 1}/{event.num_prompts}")

    def on_prompt(self, event: TrialPrompt) -> None:
        """Nothing beyond the bar: a trial's line follows when all its prompts are judged."""

    def on_trial(self, result: TrialResult) -> None:
        """Print the trial's outcome, the best so far and the time left."""
        self._bar.skip(max(0, self._steps_of_a_trial - self._trial_steps))
        if result.feasible and (self._best is None or (result.sparsity or 0.0) > (self._best.sparsity or 0.0)):
            self._best = result
        best = f"; best: trial {self._best.number + 1}, {trial_text(self._best)}" if self._best else ""
        left = f"; {self._bar.time_left} left" if self._bar.time_left else ""
        self._bar.line(f"{self._where(result.number)} ({clock(result.seconds)}): {outcome_text(result)}{best}{left}")

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """End the bar; the winner's evaluation has its own."""
        self._bar.stop()
        self._bar.line(f"winner: trial {trial.number + 1}, {trial_text(trial)}")
        self._bar.line("judging SpargeAttn's default thresholds, then the winner, on the eval prompts")

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        """Show the winner's evaluation in the same place."""
        return (EvaluationDisplay(self._bar),)

    def on_study_end(self, result: TuningResult) -> None:
        """End the bar."""
        self._bar.stop()

    def on_failure(self, error: BaseException) -> None:
        """End the bar."""
        self._bar.stop()

    @property
    def _steps_of_a_trial(self) -> int:
        return len(self._study.prompts) * self._study.num_steps if self._study is not None else 0

    def _enter(self, phase: str, total: int) -> None:
        if phase != self._phase:
            self._bar.stop()
            self._bar.start(phase, total)
            self._phase = phase

    def _where(self, number: int) -> str:
        return f"trial {number + 1}" + (f"/{self._study.n_trials}" if self._study is not None else "")


def trial_text(trial: TrialResult) -> str:
    """A trial's figures in short."""
    if trial.sparsity is None or trial.psnr is None:
        return "nothing measured"
    worst = "" if trial.psnr_worst is None else f" (worst {trial.psnr_worst:.2f})"
    return f"sparsity {trial.sparsity:.3f}, psnr {trial.psnr:.2f} dB{worst}"


def outcome_text(trial: TrialResult) -> str:
    """How a trial ended, with its figures."""
    if trial.state == "failed":
        return f"failed: {trial.reason}"
    if trial.state == "pruned":
        return f"given up: {trial.reason}"
    return f"{trial_text(trial)}, {'meets the gate' if trial.feasible else 'misses the gate'}"
