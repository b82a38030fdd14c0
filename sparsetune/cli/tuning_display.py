"""A listener that shows how a search goes on: its phases, trials in hand, the best so far and the time left."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType

from sparsetune.cli.clock import clock as clock_text
from sparsetune.cli.display import EvaluationFollower
from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.memory import read_memory
from sparsetune.cli.live.outlet import Clock, Outlet
from sparsetune.cli.live.phase import Phase
from sparsetune.cli.live.search import SearchState
from sparsetune.cli.live.search_view import search_rows
from sparsetune.cli.live.time_left import TimeLeft, search_time_left
from sparsetune.cli.log import Log
from sparsetune.evaluation.events import EvaluationListener, EvaluationStarted
from sparsetune.executor import Incident, StepDone
from sparsetune.tuning.events import (
    StudyStarted,
    TrialPrompt,
    TrialResult,
    TrialStarted,
    TuningListener,
    TuningResult,
)

_PHASES = {
    "calibrate": "calibrating on the tune prompts",
    "refine": "searching every head's thresholds on the tune prompts",
    "search": "running SpargeAttn's own search on the tune prompts",
    "probe": "probing which parts of the generation bear sparsity",
    "trials": "trying policies on the tune prompts",
    "judge": "judging SpargeAttn's default thresholds, then the winner, on the eval prompts",
}


class TuningDisplay(TuningListener):
    """Shows a search, trials that run at once included, and the judging of its winner.

    Args:
        log: of the command.
        console: of stderr; None makes one.
        clock: gives seconds.
    """

    def __init__(self, log: Log, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self.outlet = Outlet(log, self._draw, console, clock)
        self.state: SearchState | None = None
        self._said_phase = ""

    def on_study_start(self, event: StudyStarted) -> None:
        """Say what is searched, and where it can be taken up again."""
        done = f", {event.num_done} of them done earlier" if event.num_done else ""
        prompts = "1 prompt" if len(event.prompts) == 1 else f"{len(event.prompts)} prompts"
        self.outlet.say(
            "study_start",
            f"study {event.study_name}: {event.n_trials} trials{done}, on {prompts}",
            study_name=event.study_name,
            n_trials=event.n_trials,
            num_done=event.num_done,
            num_prompts=len(event.prompts),
            num_steps=event.num_steps,
        )
        self.state = SearchState.begun(event, self.outlet.clock())
        self.outlet.start()

    def on_trial_start(self, event: TrialStarted) -> None:
        """Take a trial up."""
        if self.state is None:
            return
        self.keep(self.state.trial_started(event, self.outlet.clock()))
        self.outlet.say(
            "trial_start",
            f"trial {event.number} begins",
            trial=event.number,
            params=dict(event.params),
            worker=event.worker,
        )

    def on_step(self, event: StepDone) -> None:
        """Count a step."""
        if self.state is not None:
            self.keep(self.state.stepped(event, self.outlet.clock()))

    def on_prompt(self, event: TrialPrompt) -> None:
        """Keep what a prompt of a trial came to."""
        if self.state is None:
            return
        self.keep(self.state.trial_judged(event, self.outlet.clock()))
        psnr, sparsity = event.result.metrics.get("psnr"), event.result.sparsity
        self.outlet.say(
            "trial_prompt",
            f"trial {event.number}, prompt {event.index + 1}/{event.num_prompts}: psnr {psnr} dB",
            trial=event.number,
            prompt_index=event.index,
            num_prompts=event.num_prompts,
            psnr=psnr,
            sparsity=sparsity,
        )

    def on_trial(self, result: TrialResult) -> None:
        """Say a trial's outcome, the best so far and the time left."""
        if self.state is None:
            return
        self.keep(self.state.trial_ended(result, self.outlet.clock()))
        best, left = self.state.best, self._time_left(self.outlet.clock())
        said = f"trial {result.number} ({clock_text(result.seconds)}): {outcome_text(result)}"
        said += f"; best: trial {best.number}, {trial_text(best)}" if best else ""
        said += f"; {clock_text(left.phase)} of trials left" if left.phase else ""
        names = ("state", "reason", "sparsity", "psnr", "psnr_worst", "frame_cosine", "feasible", "seconds")
        fields = {name: getattr(result, name) for name in names}
        self.outlet.say(
            "trial_end", said, trial=result.number, best_trial=None if best is None else best.number, **fields
        )

    def on_incident(self, incident: Incident) -> None:
        """Say what happened to a worker."""
        self.outlet.say("incident", incident.text, change=incident.change, worker=incident.worker)

    def on_wait(self, what: str) -> None:
        """Say what other processes are waited for."""
        self.outlet.say(
            "wait", f"nothing is left to begin; waiting for {what}, in other processes of this study", what=what
        )

    def on_winner(self, trial: TrialResult, checkpoint_path: Path) -> None:
        """Say who won; the judging follows."""
        if self.state is None:
            return
        self.outlet.say(
            "winner",
            f"winner: trial {trial.number}, {trial_text(trial)}",
            trial=trial.number,
            sparsity=trial.sparsity,
            psnr=trial.psnr,
            checkpoint_path=checkpoint_path,
        )
        self.keep(self.state.won(trial, self.outlet.clock()))

    def evaluation_listeners(self) -> tuple[EvaluationListener, ...]:
        """Show the judging in the same place."""
        return (_Judging(self),)

    def on_study_end(self, result: TuningResult) -> None:
        """End the view: the result follows."""
        self.outlet.stop()
        best = None if result.best is None else result.best.number
        self.outlet.say(
            "study_end",
            f"study {result.study_name}, {clock_text(result.seconds)}",
            best_trial=best,
            seconds=result.seconds,
            interrupted=result.interrupted,
        )

    def on_failure(self, error: BaseException) -> None:
        """End the view, and leave what it showed last: no result tells it."""
        self.outlet.stop(keep=True)

    def close(self) -> None:
        """End the view, however the command ended."""
        self.outlet.stop()

    def keep(self, state: SearchState) -> None:
        """Keep the next state; a phase that begins is said, and now and then how far it has come."""
        self.state = state
        phase = state.phase
        if phase is not None and phase.name != self._said_phase:
            self._said_phase = phase.name
            self.outlet.say("phase", _PHASES[phase.name], phase=phase.name)
        self.outlet.pulse(phase, self._time_left)

    def _time_left(self, now: float) -> TimeLeft:
        return TimeLeft() if self.state is None else search_time_left(self.state, now)

    def _draw(self, width: int, height: int) -> Sequence[RenderableType]:
        if self.state is None:
            return ()
        return search_rows(self.state, self.outlet.clock(), read_memory(), width, height)


class _Judging(EvaluationFollower):
    """Shows an evaluation within its search."""

    def __init__(self, display: TuningDisplay) -> None:
        super().__init__(display.outlet)
        self._display = display

    def begun(self, event: EvaluationStarted) -> EvaluationState:
        """Begin it in the search's state, which knows what is cached by now."""
        assert self._display.state is not None
        state = self._display.state.evaluation_begun(event, self.outlet.clock())
        self._display.keep(state)
        return state.evaluations[-1]

    def keep(self, state: EvaluationState) -> None:
        """Keep the next state in the search's."""
        super().keep(state)
        if self._display.state is not None:
            self._display.keep(self._display.state.evaluation_went_on(state, self.outlet.clock()))

    @property
    def phase(self) -> Phase | None:
        """The judging as a whole."""
        return None if self._display.state is None else self._display.state.phase

    def left(self, now: float) -> TimeLeft:
        """Estimate what is left of the search."""
        return TimeLeft() if self._display.state is None else search_time_left(self._display.state, now)


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
