"""Listener that shows the progress of a tuning: its phases, running trials, the best so far and the time left."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Task
from rich.text import Text

from sparsetune.cli.console import Log
from sparsetune.cli.evaluation_progress import PHASE, EvaluationProgress
from sparsetune.cli.progress import ProgressDisplay, Rows, TimeLeft, latest_rows, pace, pace_text, seconds_left
from sparsetune.cli.tables import clock_text, outcome_text, trial_text
from sparsetune.evaluation.events import EvaluationListener
from sparsetune.executor import Incident, StepDone
from sparsetune.tuning import events
from sparsetune.tuning.search.ranking import winner

MESSAGES = {
    "calibration": "calibrating on the tune prompts",
    "refinement": "searching every head's thresholds on the tune prompts",
    "sensitivity": "measuring how sensitive each part of the generation is",
    "trials": "running trials on the tune prompts",
    "validation": "checking the best trials on validation prompts",
    "evaluation": "evaluating SpargeAttn's default thresholds, then the winner, on the eval prompts",
}
BUILTIN_MESSAGES = {"calibration": "running SpargeAttn's own search on the tune prompts"}
PHASES_OF_TUNER = {
    "optuna": ("calibration", "sensitivity", "trials", "evaluation"),
    "calibrate": ("calibration", "refinement", "trials", "evaluation"),
    "builtin": ("calibration", "trials", "evaluation"),
}
RENDERINGS_PER_EVAL_PROMPT = 3
"""Dense, with the default thresholds, with the winner."""


class TuningProgress(events.TuningListener):
    """Shows a tuning, trials that run at once included, and the evaluation of its winner."""

    def __init__(self, log: Log, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.display = ProgressDisplay(log, "tune", {}, console, clock)
        self.evaluation = EvaluationProgress(self.display, num_evaluations=2)
        self.running: dict[int, Task] = {}
        self.ended: list[events.TrialResult] = []
        self.earlier: tuple[events.TrialResult, ...] = ()
        self.winner: events.TrialResult | None = None

    def on_study_start(self, event: events.StudyStarted) -> None:
        self.study, display = event, self.display
        self.earlier = event.study.earlier()
        tune = event.config["tune"]
        minutes = tune.get("max_minutes")
        self.deadline = None if minutes is None else display.get_time() + 60.0 * minutes
        messages = MESSAGES | (BUILTIN_MESSAGES if tune["tuner"] == "builtin" else {})
        *search, evaluation = PHASES_OF_TUNER[tune["tuner"]]
        validation = ["validation"] if event.num_validation_prompts else []
        display.add_phases({phase: messages[phase] for phase in (*search, *validation, evaluation)})
        display.title, display.subtitle = f"tune {event.config['model']['name']}", event.study_name
        display.details, display.time_left = self.rows, self.time_left
        done = f", {event.num_done} of them done earlier" if event.num_done else ""
        prompts = "1 prompt" if len(event.prompts) == 1 else f"{len(event.prompts)} prompts"
        best = "" if self.best is None else f"; best so far: trial {self.best.number}, {trial_text(self.best)}"
        message = f"study {event.study_name}: {event.n_trials} trials{done}, on {prompts}{best}"
        display.log_event("study_start", message, event, num_prompts=len(event.prompts))
        display.start()

    def on_trial_start(self, event: events.TrialStarted) -> None:
        """Add a trial; one that was lost with its worker starts again on another."""
        if event.number in self.running:
            self.display.remove_task(self.running[event.number].id)
        total = len(self.study.prompts) * self.study.num_steps
        worker = event.worker or ""
        self.display.add_task(f"trial {event.number}", total=total, worker=worker, psnrs=(), detail=worker)
        self.running[event.number] = self.display.tasks[-1]
        self._update_trials()
        self.display.log_event("trial_start", f"trial {event.number} starts", event)

    def on_step(self, event: StepDone) -> None:
        if event.phase == "preparation":  # its one event ends it
            self.display.last_event = self.display.get_time()
        elif event.phase != "trials":
            done = event.index * event.num_steps + event.step
            self.display.on_progress(event.phase, done, event.num_renderings * event.num_steps)
        elif event.trial in self.running:
            self._update_trial(event.trial, event.index, event.step, event.num_renderings, event.num_steps)

    def on_prompt(self, event: events.TrialPrompt) -> None:
        psnr = event.result.metrics.get("psnr")
        if event.number in self.running:
            psnrs = self.running[event.number].fields["psnrs"]
            self.running[event.number].fields["psnrs"] = psnrs if psnr is None else (*psnrs, psnr)
            self._update_trial(event.number, event.index + 1, 0, event.num_prompts, self.study.num_steps)
        message = f"trial {event.number}, prompt {event.index + 1}/{event.num_prompts}: psnr {psnr} dB"
        self.display.log_event("trial_prompt", message, event, psnr=psnr, sparsity=event.result.sparsity)

    def on_trial(self, result: events.TrialResult) -> None:
        self.ended.append(result)
        if result.number in self.running:
            self.display.remove_task(self.running.pop(result.number).id)
        self._update_trials()
        best, left = self.best, self.time_left()
        message = f"trial {result.number} ({clock_text(result.seconds)}): {outcome_text(result)}"
        message += f"; best: trial {best.number}, {trial_text(best)}" if best else ""
        message += f"; {clock_text(left.phase)} of trials left" if left.phase else ""
        self.display.log_event("trial_end", message, result, best_trial=best and best.number)

    def on_incident(self, incident: Incident) -> None:
        self.display.log_event("incident", incident.text, incident)

    def on_wait(self, what: str) -> None:
        self.display.log_event("wait", f"waiting for another process: {what}", what=what)

    def on_validation(self, validation: events.Validation) -> None:
        outcome = "meets" if validation.feasible else "misses"
        message = f"trial {validation.number} {outcome} the gate on the validation prompts"
        if validation.psnr is not None:
            message += f": psnr {validation.psnr:.2f} dB (worst {validation.psnr_worst:.2f})"
        self.display.log_event("validation", message, validation)

    def on_winner(self, trial: events.TrialResult, checkpoint_path: Path) -> None:
        message = f"winner: trial {trial.number}, {trial_text(trial)}"
        self.display.log_event("winner", message, trial, checkpoint_path=checkpoint_path)
        self.winner = trial
        for task in self.running.values():
            self.display.remove_task(task.id)
        self.running.clear()
        self.display.start_phase(PHASE, self.study.num_eval_prompts * RENDERINGS_PER_EVAL_PROMPT * self.study.num_steps)

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        return (self.evaluation,)

    def on_study_end(self, result: events.TuningResult) -> None:
        self.display.close()
        message = f"study {result.study_name}, {clock_text(result.seconds)}"
        self.display.log_event("study_end", message, result, best_trial=result.best and result.best.number)

    def on_failure(self, error: BaseException) -> None:
        self.display.close(keep=True)

    @property
    def best(self) -> events.TrialResult | None:
        return self.winner or winner(self.study.goal, [*self.earlier, *self.ended])

    def answer(self) -> str:
        """What is kept and what is done now, for a Ctrl-C."""
        if not hasattr(self, "study"):
            return "stopping, which takes some seconds; nothing was rendered yet"
        count = len(self.earlier) + len(self.ended)
        kept = f"{'1 trial is' if count == 1 else f'{count} trials are'} saved"
        if self.winner is not None:
            return f"stopping, which takes some seconds; {kept}, and the winner's checkpoint; its evaluation isn't"
        if count == 0:
            return "stopping, which takes some seconds; prompts that are calibrated are saved"
        searched = any(
            self.display.phases[name].started for name in ("trials", "validation") if name in self.display.phases
        )
        if self.best is None or not searched:
            return f"stopping, which takes some seconds; {kept}"
        rendering = self._rendering_seconds()
        about = "" if rendering is None else f", about {clock_text(self._evaluation_renderings * rendering)}"
        return f"stopping the search; {kept}; now evaluating the best, trial {self.best.number}{about}"

    @property
    def _evaluation_renderings(self) -> int:
        return self.study.num_eval_prompts * RENDERINGS_PER_EVAL_PROMPT

    def _update_trial(self, number: int, prompt: int, step: int, num_prompts: int, num_steps: int) -> None:
        task = self.running[number]
        psnrs = task.fields["psnrs"]
        psnr = f"psnr {sum(psnrs) / len(psnrs):.1f} dB" if psnrs else ""
        position = f"prompt {min(prompt + 1, num_prompts)}/{num_prompts}"
        parts = (position, f"step {step}/{num_steps}", task.fields["worker"], psnr)
        completed, total = prompt * num_steps + step, num_prompts * num_steps
        self.display.update(task.id, completed=completed, total=total, detail="  ".join(part for part in parts if part))
        self._update_trials()

    def _update_trials(self) -> None:
        total = float(max(1, self.study.n_trials - self.study.num_done))
        self.display.start_phase("trials", total)
        done = len(self.ended) + sum(task.percentage / 100 for task in self.running.values())
        counts = {state: sum(trial.state == state for trial in self.ended) for state in ("pruned", "failed")}
        counts["running"] = len(self.running)
        detail = f"{self.study.num_done + len(self.ended)} of {self.study.n_trials} trials"
        detail += "".join(f", {count} {name}" for name, count in counts.items() if count)
        self.display.on_progress("trials", done, total, detail)

    def time_left(self) -> TimeLeft:
        """Estimate the rest of the tuning.

        The current phase continues at its own mean pace per step or trial, which includes workers that run at once and
        pruned trials. Later phases are counted in renderings, at the mean time of those in trials or sensitivity;
        before these, nothing is known of them. `max_minutes` ends the trials at the latest.
        """
        phase = self.display.phase
        left = None if phase is None else seconds_left(phase)
        if phase is None or left is None or phase.description == PHASE:
            return self.display.phase_time_left()
        if phase.description == "trials" and phase.completed * len(self.study.prompts) < 0.5:
            return TimeLeft()  # most of the time so far went into the first prompt's dense video
        rendering = self._rendering_seconds()
        trials_end, at_most, basis = left, False, pace_text(phase, "step")
        if phase.description == "validation" and rendering is not None:
            return TimeLeft(left, left + self._evaluation_renderings * rendering, basis)
        if phase.description == "trials":
            basis = pace_text(phase, "trial") if self.ended else "the pace of the first trial"
        elif rendering is not None:
            trials_end += (self.study.n_trials - self.study.num_done) * len(self.study.prompts) * rendering
            at_most = True
        limit = None if self.deadline is None else max(0.0, self.deadline - self.display.get_time())
        if limit is not None and limit < trials_end:
            left, trials_end, basis, at_most = min(left, limit), limit, "--max-minutes ends the search", False
        if rendering is None:
            return TimeLeft(left, None, basis)
        later = 2 * self.study.num_validation_prompts + self._evaluation_renderings  # dense and sparse
        return TimeLeft(left, trials_end + later * rendering, basis, at_most)

    def _rendering_seconds(self) -> float | None:
        """Mean seconds of one rendering: of the ended trials, else of the running ones, else of sensitivity."""
        ended = [trial for trial in self.ended if trial.prompts]
        if ended:
            return sum(trial.seconds for trial in ended) / sum(len(trial.prompts) for trial in ended)
        running = [task for task in tuple(self.running.values()) if task.completed]
        if running:
            steps = sum(task.completed for task in running)
            return sum(task.elapsed or 0.0 for task in running) * self.study.num_steps / steps
        sensitivity = self.display.phases.get("sensitivity")
        step = None if sensitivity is None else pace(sensitivity)
        return None if step is None else step * self.study.num_steps

    def rows(self) -> Rows:
        best = self.best
        rows: Rows = []
        if best is not None:
            rows = [("best", Text.assemble((f"trial {best.number}", "bold green"), f"  {trial_text(best)}"))]
        elif self.ended or self.running:
            rows = [("best", Text("no trial meets the gate yet", "yellow"))]
        if self.evaluation.evaluations:
            return rows + self.evaluation.rows()
        return rows + latest_rows(self.ended, _trial_row)


def _trial_row(trial: events.TrialResult) -> Text:
    outcome, style = {
        "complete": ("met", "green") if trial.feasible else ("missed", "yellow"),
        "pruned": ("pruned", "dim"),
        "failed": ("failed", "red"),
    }[trial.state]
    text = trial_text(trial) if trial.state == "complete" else str(trial.reason)
    return Text.assemble(
        f"trial {trial.number:<3} {clock_text(trial.seconds):>5}  ", (f"{outcome:<6}", style), f"  {text}"
    )
