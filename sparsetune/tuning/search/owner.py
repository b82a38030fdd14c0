"""Who runs a trial, and whether that process still lives."""

import contextlib
import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import optuna
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

OWNER = "owner"
"""User attribute of a trial: host, id, namespace and token of the process that runs it."""

PULSE = "pulse"
"""User attribute of a trial that runs: a number that its process raises as long as it lives."""

PULSE_SECONDS = 10.0
GRACE_SECONDS = 60.0
"""How often a pulse is raised, and how long one that isn't is taken for a process that only hangs."""


def this_process() -> list[str | int]:
    """Name this process as the value of `OWNER`; its token tells it from another that had the same id earlier."""
    return [socket.gethostname(), os.getpid(), _namespace(), _token()]


def is_ours(trial: FrozenTrial) -> bool:
    """Whether this process runs a trial."""
    return trial.user_attrs.get(OWNER) == this_process()


@dataclass
class Watch:
    """Tells whether the processes that run trials live, from what was seen of them so far.

    One of this host is asked of the operating system. For any other its pulse is watched, and no clock is compared
    with another's: it is dead when the pulse was seen to stand still for `grace` seconds.

    Args:
        grace: those seconds.
    """

    grace: float = GRACE_SECONDS
    _seen: dict[int, tuple[object, float]] = field(default_factory=dict)

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the process that ran a trial is gone."""
        owner = trial.user_attrs.get(OWNER)
        if owner is None or owner == this_process():
            return owner is None  # who takes a trial names itself before its turn ends
        host, process, *rest = owner
        is_here = [host, *rest[:1]] == [socket.gethostname(), _namespace()]
        if is_here and (process == os.getpid() or not _exists(int(process))):
            return True
        pulse, now = trial.user_attrs.get(PULSE), time.monotonic()
        seen, since = self._seen.get(trial.number, (None, now))
        if trial.number not in self._seen or seen != pulse:
            self._seen[trial.number] = (pulse, now)
            return False
        return now - since > self.grace


@contextlib.contextmanager
def pulsing(study: optuna.Study, seconds: float = PULSE_SECONDS) -> Iterator[None]:
    """Raise the pulse of all trials that this process runs, in a thread, while the block runs."""
    stopped = threading.Event()

    def beat() -> None:
        count = 0
        while not stopped.wait(seconds):
            count += 1
            try:
                _raise_pulses(study, count)
            except (OptunaError, SQLAlchemyError, OSError) as error:  # the storage may be back at the next beat
                logger.warning("other processes may take this one for dead: %s", " ".join(str(error).split())[:200])

    thread = threading.Thread(target=beat, name="sparsetune-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _raise_pulses(study: optuna.Study, count: int) -> None:
    # Not study.get_trials, whose cache belongs to the thread that asks for trials.
    storage, study_id = study._storage, study._study_id
    for trial in storage.get_all_trials(study_id, deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if is_ours(trial):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # it ended just now
                storage.set_trial_user_attr(trial._trial_id, PULSE, count)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@functools.cache
def _token() -> str:
    return uuid.uuid4().hex


def _namespace() -> str:
    """Name the set of processes that ids are counted in: containers on one host have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
