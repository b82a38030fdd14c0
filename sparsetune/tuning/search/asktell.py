"""Trials under way: asked of a study, told to it when they end."""

import logging
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import optuna
from optuna.trial import FrozenTrial

from sparsetune.tuning.events import tell
from sparsetune.tuning.search.objective import Objective
from sparsetune.tuning.search.owner import pulsing
from sparsetune.tuning.search.shared import LostTrialError, SharedStudy
from sparsetune.tuning.search.warm_start import plan

logger = logging.getLogger(__name__)


class AskTell:
    """Does what `Study.optimize` does for one trial, for several at a time; a context manager while they run.

    Args:
        study: the study.
        objective: begins its trials and says what they came to.
        n_trials: trials that the study shall have in all.
    """

    def __init__(self, study: SharedStudy, objective: Objective, n_trials: int) -> None:
        self._study = study
        self._objective = objective
        self._n_trials = n_trials
        self._trials: dict[int, optuna.Trial] = {}
        self._pulsing = ExitStack()

    def __len__(self) -> int:
        return len(self._trials)

    def ask(self) -> bool:
        """Ask for a trial and begin it, and say whether there was one; one that waits in the queue goes first."""
        objective = self._objective

        def ahead(trials: list[FrozenTrial]) -> None:
            plan(self._study, trials, objective.space, objective.runner.gate, objective.aimed)

        trial = self._study.take(self._n_trials, ahead, self._objective.prepare)
        if trial is None:
            return False
        self._trials[trial.number] = trial
        self._objective.begin(trial)
        return True

    def tell_next(self) -> None:
        """Wait until a trial ends, and tell the study.

        Raises:
            TimeIsUp: the deadline passed before one did.
        """
        outcome = self._objective.runner.next()
        trial = self._trials[outcome.number]
        try:
            self._study.conclude(trial, self._objective.end(trial, outcome))
            # Not before: others count on what has an outcome, and listeners may take seconds.
            tell(self._objective.runner.listeners, lambda listener: listener.on_trial(outcome))
        except LostTrialError:
            del self._objective.runner.results[outcome.number]
            logger.warning(
                "trial %d is dropped: this process gave no sign of life for so long that another tries it again",
                outcome.number,
            )
        del self._trials[outcome.number]

    def cut_off(self) -> None:
        """Stop all trials that are under way, and put them in the queue again."""
        self._objective.runner.abandon()
        while self._trials:
            self._study.give_back(self._trials.pop(min(self._trials)))

    def __enter__(self) -> Self:
        self._pulsing.enter_context(pulsing(self._study))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pulsing.close()
