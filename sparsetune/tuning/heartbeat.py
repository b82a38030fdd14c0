"""Signs of life for trials under way, by which other processes tell that their process is alive."""

import logging
import threading
from typing import Protocol, runtime_checkable

import optuna
from optuna.exceptions import StorageInternalError

logger = logging.getLogger(__name__)


@runtime_checkable
class _Beating(Protocol):
    """A storage that keeps signs of life, as Optuna's for databases does."""

    def record_heartbeat(self, trial_id: int) -> None: ...

    def get_heartbeat_interval(self) -> int | None: ...

    def get_study_id_from_name(self, study_name: str) -> int: ...

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int: ...

    def remove_session(self) -> None: ...


class Heartbeat:
    """One thread that gives signs of life for all trials of this process, as often as their storage wants.

    `Study.optimize` has a thread for each trial; with dozens of them the database's pool of connections would run dry.

    Args:
        study_name: the study's name in the storage.
    """

    def __init__(self, study_name: str) -> None:
        self._study_name = study_name
        self._ids: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, trial: optuna.Trial) -> None:
        """Give a sign of life for a trial now, and from now on."""
        storage = trial.storage
        interval = storage.get_heartbeat_interval() if isinstance(storage, _Beating) else None
        if interval is None or not isinstance(storage, _Beating):
            return
        study_id = storage.get_study_id_from_name(self._study_name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        storage.record_heartbeat(trial_id)
        self._ids[trial.number] = trial_id
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, args=(storage, interval), name="heartbeat", daemon=True)
            self._thread.start()

    def remove(self, trial: optuna.Trial) -> None:
        """Give no further one for a trial that ended."""
        self._ids.pop(trial.number, None)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, storage: _Beating, interval: int) -> None:
        warned = False
        while not self._stopped.wait(interval):
            try:
                for trial_id in tuple(self._ids.values()):
                    storage.record_heartbeat(trial_id)
                warned = False
            except StorageInternalError as error:  # a database that was busy may answer the next time
                if not warned:
                    logger.warning("no sign of life could be left in the study's storage: %s", error)
                warned = True
        storage.remove_session()
