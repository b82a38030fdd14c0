"""An Optuna study that several processes work on at once: which trial is next, and who ends it."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sparsetune.tuning.search.owner import OWNER, Watch, is_ours, this_process
from sparsetune.tuning.search.turn import turn

POLL_SECONDS = 1.0
"""How often a process that has nothing to do looks whether a trial was left behind, or all are done."""

OUTCOME = "outcome"
"""User attribute of a trial that ended: what a later run of the study needs to know of its `TrialResult`. One
attribute, since each one is a transaction of the database, and so that it is there whole or not at all."""

PARAMS = "params"
"""User attribute of a trial: its parameters, those included that nothing is asked for; there from its beginning."""

QUEUED = "queued_with"
"""User attribute of a trial: names of those that it was put in the queue with, and keeps when it is tried again."""


class LostTrialError(Exception):
    """Another process took this one for dead, and put its trial in the queue again."""


class SharedStudy(optuna.Study):
    """Hands out the trials of a study to this process, as if no other did.

    Whatever two processes must not both decide is done in the study's turn: a trial is taken, given its parameters and
    marked with its process in one, so that others see it whole.

    Args:
        url: the storage, as `tune.storage`.
        name: the study's.
        storage: the opened storage; the study must be in it.
        pruner: of its trials.
        make_sampler: makes the sampler that asks for the parameters of the trial with a number. They then depend on
            what is in the storage alone: not on the process that asks, nor on what it asked for before.
        watch: tells which processes live.
    """

    def __init__(
        self,
        url: str,
        name: str,
        storage: BaseStorage,
        pruner: BasePruner,
        make_sampler: Callable[[int], BaseSampler],
        watch: Watch | None = None,
    ) -> None:
        super().__init__(study_name=name, storage=storage, sampler=make_sampler(0), pruner=pruner)
        self.url = url
        self.watch = watch or Watch()
        self._make_sampler = make_sampler

    def take(
        self,
        n_trials: int,
        plan: Callable[[list[FrozenTrial]], None],
        prepare: Callable[[optuna.Trial], object],
    ) -> optuna.Trial | None:
        """Give the next trial; None while all that are left run, here or elsewhere, and in the end.

        Args:
            n_trials: trials with an outcome that the study shall have in all, whoever runs them.
            plan: called first, with all trials, in the turn; it may put trials in the queue.
            prepare: called with the new trial before others see it; it asks for the parameters.
        """
        with turn(self.url, self.study_name):
            trials = self.revive()
            if _num_done(trials) + len(_running(trials)) >= n_trials:
                return None
            plan(trials)
            self.sampler = self._make_sampler(len(trials))
            trial = self.ask()
            trial.set_user_attr(OWNER, this_process())
            prepare(trial)
            return trial

    def give_back(self, trial: optuna.Trial) -> None:
        """Put a trial without an outcome in the queue again, for whoever is next."""
        with turn(self.url, self.study_name):
            for running in _running(self.get_trials(deepcopy=False)):
                if running.number == trial.number and is_ours(running):
                    with contextlib.suppress(UpdateFinishedTrialError):  # another process did so already
                        self._requeue(running)

    def put(self, params: Mapping[str, object], **marks: object) -> None:
        """Put a trial in the queue, with user attributes that it keeps when it has to be tried again."""
        self.enqueue_trial(dict(params), user_attrs={**marks, QUEUED: sorted(marks)})

    def revive(self) -> list[FrozenTrial]:
        """Put the trials that dead processes left behind in the queue again, and give all; called in the turn."""
        trials = self.get_trials(deepcopy=False)
        left = [trial for trial in trials if trial.state == TrialState.RUNNING and self.watch.is_dead(trial)]
        for trial in left:
            self._requeue(trial)
        return self.get_trials(deepcopy=False) if left else trials

    def num_done(self) -> int:
        """Count the trials that have an outcome, failed ones included; one that was cut off has none."""
        return _num_done(self.get_trials(deepcopy=False))

    def num_running(self) -> int:
        """Count the trials that other processes run, as far as is known; none where the storage doesn't answer."""
        try:
            running = _running(self.get_trials(deepcopy=False))
        except (OptunaError, SQLAlchemyError, OSError):
            return 0
        return sum(not is_ours(trial) and not self.watch.is_dead(trial) for trial in running)

    def note(self, key: str, change: Callable[[str | None], str]) -> str:
        """Change what all processes of the study keep under a key, see `Others`."""
        with turn(self.url, self.study_name):
            known = self.user_attrs.get(key)
            value = change(known)
            if value != known:
                self.set_user_attr(key, value)
            return value

    def wait(self) -> None:
        """Let the others work for a moment."""
        time.sleep(POLL_SECONDS)

    def conclude(self, trial: optuna.Trial, told: float | Sequence[float] | TrialState) -> None:
        """End a trial of this process with its value, or as pruned or failed.

        Raises:
            LostTrialError: it isn't this process's any more.
        """
        try:
            if isinstance(told, TrialState):
                self.tell(trial, state=told)
            else:
                self.tell(trial, told)
        except (UpdateFinishedTrialError, ValueError) as error:  # ValueError: what `tell` makes of one that ended
            known = next(each for each in self.get_trials(deepcopy=False) if each.number == trial.number)
            if not known.state.is_finished():
                raise
            raise LostTrialError from error

    def _requeue(self, trial: FrozenTrial) -> None:
        self.tell(trial.number, state=TrialState.FAIL)
        if OUTCOME in trial.user_attrs:  # it was recorded, and cut off before Optuna was told
            return
        asked = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        kept = {name: trial.user_attrs[name] for name in trial.user_attrs.get(QUEUED, ()) if name in trial.user_attrs}
        self.put(asked, **kept)


def _num_done(trials: list[FrozenTrial]) -> int:
    return sum(OUTCOME in trial.user_attrs for trial in trials)


def _running(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.RUNNING and OUTCOME not in trial.user_attrs]
