"""A study that several processes work on at once: which trial is next, and who ends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from sparsetune.tuning.owner import OWNER, Watch, is_ours, this_process
from sparsetune.tuning.space import CALIBRATED, THRESHOLDS
from sparsetune.tuning.turn import turn

POLL_SECONDS = 1.0
"""How often a process that has nothing to do looks whether a trial was left behind, or all are done."""

STATE = "state"
"""User attribute of a trial that has an outcome; the last one written of it."""


class Others(Protocol):
    """The processes that work on the same study, as listeners may ask of them."""

    def num_running(self) -> int:
        """Count the trials that other processes run."""

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Change what all processes of a study keep under a key, one at a time; gives what it is now.

        Args:
            key: a name.
            change: given what is kept (None where nothing is), gives what shall be.
        """


class Alone:
    """What a search that no other process can work on has for others."""

    def num_running(self) -> int:
        """None."""
        return 0

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Nothing was kept before."""
        return change(None)


class LostTrialError(Exception):
    """Another process took this one for dead, and its trial was put in the queue again."""


@dataclass
class SharedStudy:
    """Hands out the trials of a study to this process, as if no other did.

    Whatever decides something that two processes must not both decide is done in the study's turn: a trial is taken,
    given its parameters and marked with its process in one, so others see it whole.

    Args:
        study: the study.
        url: its storage, as `tune.storage`.
        n_trials: trials with an outcome that it shall have in all, whoever runs them.
        watch: tells which processes live.
    """

    study: optuna.Study
    url: str
    n_trials: int
    watch: Watch = field(default_factory=Watch)

    def take(self, plan: Callable[[], None], prepare: Callable[[optuna.Trial], None]) -> optuna.Trial | None:
        """Give the next trial; None while all that are left run elsewhere, and in the end.

        Args:
            plan: called first, with the turn taken: it may put trials in the queue and choose the sampler.
            prepare: called with the new trial before others may see it: it asks for the parameters.
        """
        with turn(self.url, self.study.study_name):
            self.revive()
            taken = self.num_done() + len(self._running())
            if taken >= self.n_trials:
                return None
            plan()
            trial = self.study.ask()
            trial.set_user_attr(OWNER, this_process())
            prepare(trial)
            return trial

    def end(self, trial: optuna.Trial, values: float | tuple[float, ...] | None, state: TrialState) -> None:
        """End a trial.

        Raises:
            LostTrialError: it isn't this process's any more.
        """
        try:
            self.study.tell(trial, values, state)
        except (UpdateFinishedTrialError, ValueError) as error:  # ValueError: what tell makes of a finished trial
            raise LostTrialError from error

    def give_back(self, trial: optuna.Trial) -> None:
        """Put a trial without an outcome in the queue again, for whoever is next."""
        with turn(self.url, self.study.study_name):
            frozen = self._frozen(trial.number)
            if not frozen.state.is_finished():
                self._requeue(frozen)

    def revive(self) -> None:
        """Put trials that dead processes left behind in the queue again; to be called in the turn."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.watch.is_dead(trial):
                self._requeue(trial)

    def is_complete(self) -> bool:
        """Whether all trials have an outcome."""
        return self.num_done() >= self.n_trials

    def num_done(self) -> int:
        """Count the trials that have an outcome, failed ones included; one that was cut off has none."""
        return sum(STATE in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def num_running(self) -> int:
        """Count the trials that other processes run, as far as is known."""
        return sum(not is_ours(trial) and not self.watch.is_dead(trial) for trial in self._running())

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Change what all processes of the study keep under a key, see `Others`."""
        with turn(self.url, self.study.study_name):
            known = self.study.user_attrs.get(key)
            value = change(known)
            if value != known:
                self.study.set_user_attr(key, value)
            return value

    def wait(self) -> None:
        """Let the others work for a moment."""
        time.sleep(POLL_SECONDS)

    def _running(self) -> list[FrozenTrial]:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if STATE not in trial.user_attrs]

    def _frozen(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def _requeue(self, trial: FrozenTrial) -> None:
        self.study.tell(trial.number, state=TrialState.FAIL)
        if STATE in trial.user_attrs:  # it was recorded, and cut off before Optuna was told
            return
        asked = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        # Of what it began with, only what was put in the queue with it holds for the next try too.
        kept = {key: trial.user_attrs[key] for key in KEPT_IN_QUEUE if key in trial.user_attrs}
        self.study.enqueue_trial(asked, user_attrs={THRESHOLDS: CALIBRATED} | kept)


KEPT_IN_QUEUE = (THRESHOLDS, "bisection")
