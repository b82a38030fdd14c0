"""Trials under way: asked of an Optuna study, told to it when they end."""

import warnings
from types import TracebackType
from typing import Self

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from sparsetune.tuning.events import TrialResult
from sparsetune.tuning.heartbeat import Heartbeat
from sparsetune.tuning.objective import Objective


class AskTell:
    """Does what `Study.optimize` does for one trial, for several at a time; a context manager while they run.

    Args:
        study: the study.
        objective: begins its trials and says what they came to.
    """

    def __init__(self, study: optuna.Study, objective: Objective) -> None:
        self._study = study
        self._objective = objective
        self._trials: dict[int, optuna.Trial] = {}
        self._heartbeat = Heartbeat(study.study_name)

    def __len__(self) -> int:
        return len(self._trials)

    def ask(self) -> None:
        """Ask for a trial and begin it; one that waits in the queue goes first."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
            warnings.filterwarnings("ignore", message="Heartbeat of storage")  # it is ours, see `Heartbeat`
            trial = self._study.ask()
        self._trials[trial.number] = trial
        self._heartbeat.add(trial)
        self._objective.begin(trial)

    def tell_next(self) -> TrialResult:
        """Wait until a trial ends, and tell the study.

        Raises:
            TimeIsUp: the deadline passed before one did.
        """
        outcome = self._objective.runner.next()
        trial = self._trials[outcome.number]
        told = self._objective.end(trial, outcome)
        if isinstance(told, TrialState):
            self._study.tell(trial, state=told)
        else:
            self._study.tell(trial, told)
        del self._trials[outcome.number]
        self._heartbeat.remove(trial)
        return outcome

    def cut_off(self) -> tuple[FrozenTrial, ...]:
        """Stop all trials that are under way; they end as failed and are given, in order."""
        self._objective.runner.abandon()
        ended = tuple(
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True) for trial in self._trials.values()
        )
        self._trials.clear()
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.stop()
