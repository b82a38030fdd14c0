"""What a search in progress has come to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

from sparsetune.cli.live.evaluation import EvaluationState
from sparsetune.cli.live.phase import Phase
from sparsetune.config.models import Goal
from sparsetune.evaluation.events import EvaluationStarted
from sparsetune.executor import StepDone
from sparsetune.tuning.events import (
    StudyStarted,
    TrialPrompt,
    TrialResult,
    TrialStarted,
)
from sparsetune.tuning.search.ranking import winner

TRIALS: Final = "trials"
JUDGE: Final = "judge"

_PHASES: Final[Mapping[str, tuple[str, ...]]] = {
    "optuna": ("calibrate", "probe", TRIALS, JUDGE),
    "calibrate": ("calibrate", "refine", TRIALS, JUDGE),
    "builtin": ("search", TRIALS, JUDGE),
}


@dataclass(frozen=True)
class Running:
    """A trial in hand.

    Args:
        number: from 0.
        started: when, in seconds of the state's clock.
        worker: what runs it; None is this process.
        index: the prompt in hand, from 0.
        num_prompts: that it will render at most.
        step: of that prompt, from 1.
        num_steps: of a rendering.
        psnrs: of the prompts that are judged, in dB.
    """

    number: int
    started: float
    worker: str | None
    num_prompts: int
    num_steps: int
    index: int = 0
    step: int = 0
    psnrs: tuple[float, ...] = ()

    @property
    def fraction(self) -> float:
        """How much of its renderings is done, in [0, 1]."""
        whole = self.num_prompts * self.num_steps
        return 0.0 if not whole else min(1.0, (self.index * self.num_steps + self.step) / whole)


@dataclass(frozen=True)
class SearchState:
    """A search as far as it has come; every event gives the next state.

    Trials are kept by number, since several may be in hand at once.

    Args:
        model: short name of the model.
        study: as it began.
        goal: what trials compete in.
        phases: in order.
        started: when, in seconds of a clock.
        moment: of the last event.
        deadline: when the search is to end by `tune.max_minutes`; None is never.
        running: the trials in hand, by number, in the order in which they began.
        ended: the trials that ended in this run, in that order.
        evaluations: of the defaults and of the winner, as far as they have begun.
        winner: of the whole search, trials of earlier runs included; None before its end.
    """

    model: str
    study: StudyStarted
    goal: Goal
    phases: tuple[Phase, ...]
    started: float
    moment: float
    deadline: float | None = None
    running: Mapping[int, Running] = field(default_factory=dict)
    ended: tuple[TrialResult, ...] = ()
    evaluations: tuple[EvaluationState, ...] = ()
    winner: TrialResult | None = None

    @classmethod
    def begun(cls, event: StudyStarted, now: float) -> Self:
        """Begin; `event.config` says how it will go."""
        tune = event.config.get("tune", {})
        minutes = tune.get("max_minutes")
        return cls(
            model=event.config.get("model", {}).get("name", ""),
            study=event,
            goal=tune.get("objective", "sparsity"),
            phases=tuple(Phase(name) for name in _PHASES[tune.get("tuner", "optuna")]),
            started=now,
            moment=now,
            deadline=None if minutes is None else now + 60.0 * minutes,
        )

    def stepped(self, event: StepDone, now: float) -> Self:
        """Count a step of any phase before the evaluation."""
        match event.phase:
            case "calibration":
                return self.calibrated(event, now)
            case "refinement":
                return self.refined(event, now)
            case "sensitivity":
                return self.probed(event, now)
            case _:
                return self.trial_stepped(event, now)

    def calibrated(self, event: StepDone, now: float) -> Self:
        """Count a step of the calibration, or of SpargeAttn's search."""
        place = event.index * event.num_steps + event.step
        return self._counted(self.phases[0].name, now, place, event.num_renderings * event.num_steps)

    def refined(self, event: StepDone, now: float) -> Self:
        """Count a step of a rendering on which thresholds are searched."""
        place = event.index * event.num_steps + event.step
        return self._counted("refine", now, place, event.num_renderings * event.num_steps)

    def probed(self, event: StepDone, now: float) -> Self:
        """Count a step of a probe."""
        place = event.index * event.num_steps + event.step
        return self._counted("probe", now, place, event.num_renderings * event.num_steps)

    def trial_started(self, event: TrialStarted, now: float) -> Self:
        """Take a trial up, or up again where another worker died over it."""
        begun = Running(event.number, now, event.worker, len(self.study.prompts), self.study.num_steps)
        total = float(max(1, self.study.n_trials - self.study.num_done))
        return self._entered(TRIALS, now, now, total)._with_running({**self.running, event.number: begun}, now)

    def trial_stepped(self, event: StepDone, now: float) -> Self:
        """Count a step of a trial."""
        known = None if event.trial is None else self.running.get(event.trial)
        if known is None:
            return self
        stepped = replace(
            known, index=event.index, num_prompts=event.num_renderings, step=event.step, num_steps=event.num_steps
        )
        return self._with_running({**self.running, known.number: stepped}, now)

    def trial_judged(self, event: TrialPrompt, now: float) -> Self:
        """Keep the psnr of a prompt of a trial."""
        known = self.running.get(event.number)
        psnr = event.result.metrics.get("psnr")
        if known is None or psnr is None:
            return self
        judged = replace(known, index=event.index + 1, step=0, psnrs=(*known.psnrs, psnr))
        return self._with_running({**self.running, event.number: judged}, now)

    def trial_ended(self, result: TrialResult, now: float) -> Self:
        """Keep a trial's outcome."""
        left = {number: trial for number, trial in self.running.items() if number != result.number}
        return replace(self, ended=(*self.ended, result))._with_running(left, now)

    def won(self, trial: TrialResult, now: float) -> Self:
        """Go on to the judging of the winner: no trial is in hand any more."""
        return replace(self, running={}, winner=trial, moment=now)._entered(JUDGE, now, now, None)

    def evaluation_begun(self, event: EvaluationStarted, now: float) -> Self:
        """Begin the next evaluation; the second finds the dense videos that the first has rendered."""
        begun = EvaluationState.begun(event, now, ("dense",) if self.evaluations else ())
        return replace(self, evaluations=(*self.evaluations, begun))._judged(now)

    def evaluation_went_on(self, evaluation: EvaluationState, now: float) -> Self:
        """Put the next state of the evaluation in hand in its place."""
        return replace(self, evaluations=(*self.evaluations[:-1], evaluation))._judged(now)

    @property
    def phase(self) -> Phase | None:
        """The phase in hand; None before the first and after the last."""
        return next((phase for phase in self.phases if phase.running), None)

    @property
    def best(self) -> TrialResult | None:
        """The winner; before there is one, the best trial of this run that meets the gate on the tune prompts."""
        return self.winner or winner(self.goal, self.ended)

    @property
    def num_pruned(self) -> int:
        """How many trials were given up."""
        return sum(trial.state == "pruned" for trial in self.ended)

    @property
    def num_failed(self) -> int:
        """How many trials failed."""
        return sum(trial.state == "failed" for trial in self.ended)

    def named(self, name: str) -> Phase:
        """Give the phase of a name."""
        return next(phase for phase in self.phases if phase.name == name)

    def _counted(self, name: str, now: float, place: int, total: int) -> Self:
        """Count the unit at a place of a phase, after which as many are done; what comes before the first was kept."""
        entered = self._entered(name, now, self.moment, float(total), kept=float(place - 1))
        return entered._with_phase(replace(entered.named(name), done=float(place)), now)

    def _entered(self, name: str, now: float, since: float, total: float | None, kept: float = 0.0) -> Self:
        """Begin a phase, which it did at `since`, unless it has begun; those before it were over with the last event.

        A step tells of itself when it is done, so the first one of a phase took the time since the last event.
        """
        if self.named(name).started is not None:
            return self
        place = [phase.name for phase in self.phases].index(name)
        phases = (
            *(phase.end(self.moment) for phase in self.phases[:place]),
            self.phases[place].begin(since, total, kept),
            *self.phases[place + 1 :],
        )
        return replace(self, phases=phases, moment=now)

    def _with_phase(self, changed: Phase, now: float) -> Self:
        phases = tuple(changed if phase.name == changed.name else phase for phase in self.phases)
        return replace(self, phases=phases, moment=now)

    def _with_running(self, running: Mapping[int, Running], now: float) -> Self:
        done = len(self.ended) + sum(trial.fraction for trial in running.values())
        return replace(self, running=running)._with_phase(replace(self.named(TRIALS), done=done), now)

    def _judged(self, now: float) -> Self:
        """Bring the judging's phase up to date: the steps of both evaluations, of which the second is foreseen."""
        total = sum(one.phase.total or 0.0 for one in self.evaluations)
        if len(self.evaluations) == 1:
            total += self.evaluations[0].num_prompts * self.evaluations[0].num_steps
        judging = self._entered(JUDGE, now, now, None)
        done = sum(one.phase.done for one in self.evaluations)
        return judging._with_phase(replace(judging.named(JUDGE), total=total, done=done), now)
